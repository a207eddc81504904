"""Vectors through the embedding bank: each (encoder, text) is encoded once, whoever asks and under whatever prompt and role.

The bank's key of a text is that of what the model reads, prompt + text, so equal text under equal prompts is shared between
queries and passages. New vectors are committed shard by shard, in an order that a restart reproduces.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparsekd.bank.embeddings import EmbeddingBank, Embeddings
from sparsekd.bank.sharing import Items, Part, Positions, SharedShards
from sparsekd.bank.sparse import SparseVectors
from sparsekd.bank.text_key import text_keys
from sparsekd.recipe import Run
from sparsekd.teachers.batching import BLOCK
from sparsekd.teachers.keys import unique_keys
from sparsekd.teachers.progress import progress
from sparsekd.teachers.protocols import Encoder, Role

if TYPE_CHECKING:
    from sparsekd.teachers.sparse import SparseTeacher

_log = logging.getLogger(__name__)


def banked_vectors(encoder: Encoder, bank: EmbeddingBank, texts: Sequence[str], role: Role, run: Run) -> NDArray[np.float32]:
    """Return float32 [n, D] in input order, encoding only texts that are not banked and committing every ``run.shard_pairs``.

    Holds the vectors of the unique texts in memory, 4 D bytes each. Loads the model only if a text is missing, and no process that
    asks for the same texts meanwhile encodes them too.
    """
    if not texts:
        return np.empty((0, encoder.dimension), dtype=np.float32)
    prompt = encoder.identity[f"{role}_prompt"]
    vectors_bank = bank.open(encoder.identity, reference=encoder.reference)
    keys, first, inverse = unique_keys(text_keys(prompt + text for text in texts))
    unique = [texts[position] for position in first.tolist()]

    def encode(shard: Positions, done: Callable[[int], object]) -> None:
        vectors_SD = np.empty((len(shard), encoder.dimension), dtype=np.float32)
        for begin in range(0, len(shard), BLOCK):
            block = shard[begin : begin + BLOCK]
            vectors_SD[begin : begin + BLOCK] = encoder.encode([unique[position] for position in block.tolist()], role=role)
            done(len(block))
        vectors_bank.append(keys[shard], vectors_SD)

    bank_texts(vectors_bank, keys, unique, encode, encoder, role, run)
    vectors_UD: NDArray[np.float32] = vectors_bank.lookup(keys)[1]
    return vectors_UD[inverse]


def bank_texts(
    banked: Embeddings | SparseVectors,
    keys: NDArray[np.uint64],
    texts: Sequence[str],
    encode: Callable[[Positions, Callable[[int], object]], None],
    model: Encoder | SparseTeacher,
    role: Role,
    run: Run,
) -> None:
    """Have ``encode`` bank the vectors of ``texts`` [n], unique and of these ``keys`` [n, 2], that are not there yet, by shards.

    ``encode`` is given the positions of a shard and what to tell of its progress; when it returns they are banked. Raises
    QuarantineError if a text ends every process that encodes it.
    """
    missing = ~banked.known(keys)
    # Longest first; ties by key (unique_keys sorts), so what is left after a crash splits into the same shards and batches.
    order = np.argsort([-len(text) for text in texts], kind="stable").astype(np.int64)
    todo, num_encoded = int(missing.sum()), 0
    items = Items(
        keys, order, missing, lambda positions: banked.known(keys[positions]), lambda position: f"text {texts[position][:80]!r}"
    )
    with (
        progress(f"encode {role} texts ({1 - todo / len(texts):.0%} reused)", total=todo, unit="texts") as bar,
        SharedShards(banked.folder, items, size=run.shard_pairs, part=Part(*run.part)) as shards,
    ):
        for free in shards.passes():
            for shard in free:
                encode(shard, bar.update)
                shards.committed()
                num_encoded += len(shard)
        shards.refuse_quarantined(f"model {model.reference}", np.flatnonzero(missing))
    _log.info(
        "%s texts: unique %d, encoded %d, reused %d, by other processes %d, cut to the limit so far %d",
        role,
        len(keys),
        num_encoded,
        len(keys) - todo,
        todo - num_encoded,
        model.num_truncated,
    )
