"""Which terms a system's postings are made of: what a ranking cannot show, kept beside it as ``vocabulary.json``.

A student can rank well on dims that are in every passage, which no inverted index likes; its document frequencies show it.
P passages, V dims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from bm25s.stopwords import STOPWORDS_EN
from numpy.typing import NDArray

if TYPE_CHECKING:
    import scipy.sparse
    from sentence_transformers import SparseEncoder

VOCABULARY = "vocabulary.json"
STOP_WORDS = frozenset(STOPWORDS_EN)
"""Lucene's 33 English ones: an upper bound of what a sparse vector can spend on words that tell passages apart least."""
MOST_ACTIVE = 40
_CURVE_POINTS = 120


def dim_terms(model: SparseEncoder) -> list[str]:
    """Return what each dim of a student's vectors means, in order: a term of its tokenizer, or the dim's number."""
    from sparsekd.training.rows import dims_are_terms, tokenizer_of

    num_dims = model.get_embedding_dimension() or 0
    if not dims_are_terms(model):
        return [f"dim {dim}" for dim in range(num_dims)]
    terms: list[str] = tokenizer_of(model).convert_ids_to_tokens(list(range(num_dims)))
    return [f"dim {dim}" if term is None else term for dim, term in enumerate(terms)]


def student_vocabulary(passage_csr: scipy.sparse.csr_matrix, terms: Sequence[str]) -> dict[str, Any]:
    """Return the facts of a student's passage vectors, CSR [P, V], whose dims mean ``terms``."""
    active = passage_csr.indices[passage_csr.data != 0]
    frequency_V = np.bincount(active, minlength=passage_csr.shape[1])
    return vocabulary_facts(dict(zip(distinct(terms), frequency_V.tolist(), strict=True)), passage_csr.shape[0])


def vocabulary_facts(document_frequency: Mapping[str, int], num_passages: int) -> dict[str, Any]:
    """Return postings, terms in use, the most active terms, the stop words' share of the postings, and the curve.

    ``curve``: [rank, passages] of terms sorted by document frequency, ranks from 1, spaced evenly in their logarithm.
    """
    used = {term: int(count) for term, count in document_frequency.items() if count}
    postings = sum(used.values())
    ordered = sorted(used.items(), key=lambda item: (-item[1], item[0]))
    frequency = np.array([count for _, count in ordered], dtype=np.int64)
    return {
        "passages": num_passages,
        "dims": len(document_frequency),
        "terms_used": len(used),
        "postings": postings,
        "stop_word_share": sum(used.get(word, 0) for word in STOP_WORDS) / postings if postings else None,
        "most_active": [[term, count] for term, count in ordered[:MOST_ACTIVE]],
        "curve": _curve(frequency),
    }


def _curve(frequency: NDArray[np.int64]) -> list[list[int]]:
    if not frequency.size:
        return []
    ranks = np.unique(np.geomspace(1, frequency.size, _CURVE_POINTS).round().astype(np.int64))
    return [[int(rank), int(frequency[rank - 1])] for rank in ranks]


def distinct(terms: Sequence[str]) -> list[str]:
    """Return names as they are, but for one that two dims share, as where a tokenizer has holes."""
    seen: dict[str, int] = {}
    names = []
    for dim, term in enumerate(terms):
        names.append(f"{term} (dim {dim})" if term in seen else term)
        seen[term] = dim
    return names
