"""The side without a transformer: a text weighs its own terms by a table, one weight per vocabulary entry (arXiv 2411.04403).

The table starts from the collection's inverse document frequency or from ones; special tokens weigh 0 in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparsekd.recipe import Student
from sparsekd.students.body import load_tokenizer

if TYPE_CHECKING:
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PASSAGES_AT_ONCE = 1024


def static_embedding(student: Student, folder: Path) -> SparseStaticEmbedding:
    """Return the module with a weight of 1 per term and 0 per special token.

    It has a tokenizer of its own: the module cuts texts where its tokenizer says, whatever its ``max_seq_length`` is set to.
    """
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

    tokenizer: Any = load_tokenizer(student, folder)
    tokenizer.model_max_length = student.max_length
    weight = torch.ones(len(tokenizer.get_vocab()))
    weight[list(tokenizer.all_special_ids)] = 0.0
    return SparseStaticEmbedding(tokenizer, weight=weight, frozen=student.static_frozen)


def fit_vocabulary(student: Student, tokenizer: PreTrainedTokenizerBase, masked_lm: PreTrainedModel) -> None:
    """Cut the masked LM's vocabulary to the tokenizer's: ids above it, put there to round the number, belong to no term.

    The saved table has one weight per token and both sides need one width. Raises ValueError if the ids have gaps.
    """
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) + 1 != len(vocabulary):
        raise ValueError(
            f'[student] expansion = "{student.expansion}": the tokenizer of {student.model} has {len(vocabulary)} tokens with ids '
            f'up to {max(vocabulary.values())}; expected no gaps; choose another model or expansion = "both"'
        )
    if masked_lm.config.vocab_size > len(vocabulary):
        masked_lm.resize_token_embeddings(len(vocabulary))


def start_from_idf(table: SparseStaticEmbedding, passages: Sequence[str]) -> None:
    """Set the weight of each term to its inverse document frequency over ``passages``; special tokens stay at 0."""
    tokenizer: Any = table.tokenizer
    weight_V = inverse_document_frequency(document_frequency(tokenizer, passages), len(passages))
    weight_V[list(tokenizer.all_special_ids)] = 0.0
    with torch.no_grad():
        table.weight.copy_(torch.from_numpy(weight_V))


def document_frequency(tokenizer: PreTrainedTokenizerBase, passages: Sequence[str]) -> NDArray[np.int64]:
    """Return, int64 [V] by token id, in how many ``passages`` each token occurs."""
    frequency_V = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=np.int64)
    for ids in whole_passage_ids(tokenizer, passages):
        frequency_V[np.unique(np.asarray(ids, dtype=np.int64))] += 1
    return frequency_V


def whole_passage_ids(tokenizer: PreTrainedTokenizerBase, passages: Sequence[str]) -> Iterator[list[int]]:
    """Yield the token ids of each passage, uncut and without the special tokens that a model puts around it."""
    for start in range(0, len(passages), _PASSAGES_AT_ONCE):
        chunk = list(passages[start : start + _PASSAGES_AT_ONCE])
        yield from tokenizer(chunk, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]


def inverse_document_frequency(frequency_V: NDArray[np.int64], num_passages: int) -> NDArray[np.float32]:
    """Return ln((N − df + 0.5) / (df + 0.5) + 1), float32 [V]: BM25's, as Lucene has it; above 0 whatever df is.

    >>> [round(float(weight), 4) for weight in inverse_document_frequency(np.array([0, 1, 3]), 3)]
    [2.0794, 0.9808, 0.1335]
    """
    frequency = frequency_V.astype(np.float64)
    return np.log1p((num_passages - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)
