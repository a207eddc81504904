"""The student as a retriever: texts to sparse vectors, exact sparse search, and how sparse it is.

Vectors are scipy CSR, float32 [n, V], made batch by batch: 8 bytes per active dim, and never more than one dense block of
vectors at a time. Search is exact and costs a few float32 per passage for each query of a block.
Q queries, P passages, V vocabulary, K search depth.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from sparsekd.evaluation.measures import DEPTH
from sparsekd.evaluation.runs import Ranking
from sparsekd.mining.ranking import to_ids
from sparsekd.mining.sparse import SparseIndex
from sparsekd.teachers.batching import BLOCK, forward_tokens, length_batches
from sparsekd.teachers.progress import progress

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SparseEncoder

logger = logging.getLogger(__name__)

Role = Literal["query", "passage"]

_PROMPT_BY_ROLE = {"query": "query", "passage": "document"}  # the names encode_query and encode_document look up
_BLOCK_ROWS = 256  # dense vectors at once: 31 MB at 30,522 terms; a batch of short queries would otherwise have a thousand


def encode_csr(
    model: SparseEncoder, texts: Sequence[str], *, role: Role, batch_tokens: int, fused: bool, packed: bool = True
) -> scipy.sparse.csr_matrix:
    """Return float32 [n, V] in input order: what encode_query or encode_document gives, up to float rounding.

    ``fused`` computes the head block by block; without it a batch's logits take 4 · batch_tokens · V bytes. ``packed`` runs texts
    without padding where the model can. Raises ValueError if a weight is not finite, naming how many vectors and the first text.
    """
    nothing = scipy.sparse.csr_matrix((0, model.get_embedding_dimension()), dtype=np.float32)  # no texts have a width too
    blocks = [texts[start : start + BLOCK] for start in range(0, len(texts), BLOCK)]
    encoded = encoded_blocks(model, blocks, role=role, total=len(texts), batch_tokens=batch_tokens, fused=fused, packed=packed)
    return scipy.sparse.vstack([nothing, *encoded], format="csr")


def encoded_blocks(
    model: SparseEncoder,
    blocks: Iterable[Sequence[str]],
    *,
    role: Role,
    total: int,
    batch_tokens: int,
    fused: bool,
    packed: bool = True,
) -> Iterator[scipy.sparse.csr_matrix]:
    """Yield the vectors of each block of texts, as ``encode_csr`` gives them, before the next block is read.

    ``total`` texts are announced. Blocks of BLOCK texts batch well. Raises ValueError at the first block with a weight that is not
    finite.
    """
    import torch

    from sparsekd.packed_body import evaluating
    from sparsekd.students.fast import fast_student

    tokens, prompt, num_cut = forward_tokens(batch_tokens, model.device.type), model.prompts.get(_PROMPT_BY_ROLE[role]) or "", 0
    with (
        progress(f"encode {role} texts", total=total, unit="texts") as bar,
        evaluating(model),
        torch.inference_mode(),
        fast_student(model, packed=packed, fused=fused),
    ):
        for block in blocks:
            vectors, cut = _encoded(model, list(block), role, prompt, tokens)
            _refuse_non_finite(vectors, block, role)
            num_cut += cut
            yield vectors
            bar.update(len(block))
    logger.info("student: %s texts %d, %d of them over the limit of tokens and cut there", role, total, num_cut)


def sparse_rankings(
    query_csr: scipy.sparse.csr_matrix,
    passage_csr: scipy.sparse.csr_matrix,
    query_ids: Sequence[str],
    passage_ids: Sequence[str],
    *,
    depth: int = DEPTH,
) -> dict[str, Ranking]:
    """Return every query's best ``depth`` passages by student_sim, the dot product; only scores above 0, so maybe fewer.

    Exact: every passage that shares an active dim with the query is scored. Raises ValueError if shapes and ids do not fit.
    """
    shapes, expected = (query_csr.shape, passage_csr.shape), (len(query_ids), len(passage_ids))
    if (shapes[0][0], shapes[1][0]) != expected or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            f"sparse search: vectors {shapes[0]} and {shapes[1]} for {expected[0]} query_ids and {expected[1]} passage_ids; "
            "expected one row each and one vocabulary"
        )
    positions_QK, scores_QK = SparseIndex(passage_csr, passage_ids).search_positions(query_csr, depth)
    found = to_ids(positions_QK, scores_QK, passage_ids)
    return {query_id: Ranking(ids, scores) for query_id, ids, scores in zip(query_ids, *found, strict=True)}


def of_unit_length(vectors: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """Return the vectors divided by their length, so that their dot product is the cosine; an empty one stays empty."""
    lengths = np.sqrt(np.asarray(vectors.multiply(vectors).sum(axis=1)).ravel())
    return scipy.sparse.diags_array(1 / np.where(lengths > 0, lengths, 1)).dot(vectors).astype(np.float32).tocsr()


def sparsity(query_csr: scipy.sparse.csr_matrix, passage_csr: scipy.sparse.csr_matrix) -> dict[str, float]:
    """Return mean active dims of queries and passages, and FLOPS.

    FLOPS = sum over dims j of p_query(j) · p_passage(j), p the share of vectors with j active: the multiplications expected for
    one query and one passage drawn at random (Paria et al. 2020, arXiv 2004.05665; measured so by Formal et al. 2021, arXiv
    2107.05720). Raises ValueError if there are no queries or no passages.
    """
    shares = []
    for name, vectors in (("query", query_csr), ("passage", passage_csr)):
        if not vectors.shape[0]:
            raise ValueError(f"sparsity: no {name} vectors; expected at least one")
        active = vectors.indices[vectors.data != 0]
        shares.append(np.bincount(active, minlength=vectors.shape[1]) / vectors.shape[0])
    return {
        "query_active_dims": float(shares[0].sum()),
        "passage_active_dims": float(shares[1].sum()),
        "FLOPS": float(shares[0] @ shares[1]),
    }


def _encoded(
    model: SparseEncoder, texts: list[str], role: Role, prompt: str, tokens: int
) -> tuple[scipy.sparse.csr_matrix, int]:
    """Return the texts' vectors in input order, and how many texts were over the limit."""
    features = model.preprocess(texts, prompt=prompt or None, task=_PROMPT_BY_ROLE[role])
    lengths = _num_tokens(features)
    order, parts = [], []
    for batch in length_batches(lengths, tokens):
        for first in range(0, len(batch), _BLOCK_ROWS):
            rows = batch[first : first + _BLOCK_ROWS]
            order.append(rows)
            parts.append(_to_csr(_forward(model, _select(features, rows, lengths), role)))
    vectors = scipy.sparse.vstack(parts, format="csr")[np.argsort(np.concatenate(order))]
    return vectors, _num_cut(model, role, [prompt + text for text in texts], lengths)


def _refuse_non_finite(vectors: scipy.sparse.csr_matrix, texts: Sequence[str], role: Role) -> None:
    bad = np.flatnonzero(~np.isfinite(vectors.data))
    if bad.size:
        rows = np.unique(np.searchsorted(vectors.indptr, bad, side="right") - 1)
        raise ValueError(
            f"student: {len(rows)} of {len(texts)} {role} vectors are not finite (first: {texts[rows[0]][:80]!r}); "
            "its training diverged; lower [training] learning_rate"
        )


def _num_tokens(features: dict[str, Any]) -> NDArray[np.int64]:
    """Tokens of each text as the model will see them."""
    lengths = features["cu_seq_lens_q"].diff() if "cu_seq_lens_q" in features else features["attention_mask"].sum(dim=1)
    return np.asarray(lengths.numpy(), dtype=np.int64)


def _num_cut(model: SparseEncoder, role: Role, texts: list[str], lengths: NDArray[np.int64]) -> int:
    """Count texts longer than the route's limit; only those that reach it are tokenised again."""
    from sentence_transformers.base.modules import Router, Transformer

    module: Any = model[0]
    if isinstance(module, Router):
        routes: Any = module.sub_modules
        module = routes[module._resolve_route(task=_PROMPT_BY_ROLE[role])][0]
    full = np.flatnonzero(lengths >= (module.max_seq_length or np.iinfo(np.int64).max)).tolist()
    if not full:
        return 0
    tokens = module.tokenizer(
        [texts[text] for text in full],
        truncation=False,
        add_special_tokens=isinstance(module, Transformer),  # a static embedding weighs the words alone
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    return sum(len(ids) > lengths[text] for text, ids in zip(full, tokens, strict=True))


def _select(features: dict[str, Any], rows: NDArray[np.int64], lengths: NDArray[np.int64]) -> dict[str, Any]:
    """Features of these texts alone, with no more padding than they need."""
    import torch

    from sparsekd.packed_body import select_texts

    if "cu_seq_lens_q" in features:
        return select_texts(features, rows.tolist())
    longest = int(lengths[rows].max())
    return {
        name: value[rows, :longest] if isinstance(value, torch.Tensor) and value.ndim == 2 else value
        for name, value in features.items()
    }


def _forward(model: SparseEncoder, features: dict[str, Any], role: Role) -> torch.Tensor:
    """Dense vectors [n, V] on the model's device, pruned where the model says so."""
    from sentence_transformers.util import batch_to_device, select_max_active_dims

    vectors: torch.Tensor = model(batch_to_device(features, model.device), task=_PROMPT_BY_ROLE[role])["sentence_embedding"]
    if model.max_active_dims is not None:
        vectors = select_max_active_dims(vectors, max_active_dims=model.max_active_dims)
    return vectors


def _to_csr(vectors: torch.Tensor) -> scipy.sparse.csr_matrix:
    """Take the active dims out on the device; only they are copied."""
    rows, terms = vectors.nonzero(as_tuple=True)
    counts = rows.bincount(minlength=len(vectors)).cpu().numpy()
    data = vectors[rows, terms].float().cpu().numpy()
    starts = np.concatenate(([0], np.cumsum(counts)))
    return scipy.sparse.csr_matrix((data, terms.int().cpu().numpy(), starts), shape=tuple(vectors.shape))
