"""Vectors through the embedding bank: each (encoder, text) is encoded once, whoever asks and under whatever prompt and role.

The bank's key of a text is that of what the model reads, prompt + text, so equal text under equal prompts is shared between
queries and passages. New vectors are committed shard by shard, in an order that a restart reproduces.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sparsekd.bank.embeddings import EmbeddingBank
from sparsekd.bank.text_key import text_keys
from sparsekd.teachers.batching import BLOCK
from sparsekd.teachers.keys import unique_keys
from sparsekd.teachers.progress import progress
from sparsekd.teachers.protocols import Encoder, Role

_log = logging.getLogger(__name__)


def banked_vectors(
    encoder: Encoder, bank: EmbeddingBank, texts: Sequence[str], role: Role, shard_texts: int
) -> NDArray[np.float32]:
    """Return float32 [n, D] in input order, encoding only texts that are not banked and committing every ``shard_texts``.

    Holds the vectors of the unique texts in memory, 4 D bytes each. Loads the model only if a text is missing.
    """
    if not texts:
        return np.empty((0, encoder.dimension), dtype=np.float32)
    prompt = encoder.identity[f"{role}_prompt"]
    vectors_bank = bank.open(encoder.identity, reference=encoder.reference)
    keys, first, inverse = unique_keys(text_keys(prompt + text for text in texts))
    found, known_UD = vectors_bank.lookup(keys)
    missing = np.flatnonzero(~found)
    vectors_UD = np.empty((len(keys), known_UD.shape[1] or encoder.dimension), dtype=np.float32)
    if found.any():  # an empty bank does not know D
        vectors_UD[found] = known_UD
    # Longest first; ties by key (unique_keys sorts), so what is left after a crash splits into the same shards and batches.
    lengths = np.array([len(texts[first[position]]) for position in missing], dtype=np.int64)
    missing = missing[np.argsort(-lengths, kind="stable")]
    with progress(f"encode {role} texts ({found.mean():.0%} reused)", total=len(missing), unit="texts") as bar:
        for start in range(0, len(missing), shard_texts):
            shard = missing[start : start + shard_texts]
            for begin in range(0, len(shard), BLOCK):
                block = shard[begin : begin + BLOCK]
                vectors_UD[block] = encoder.encode([texts[first[position]] for position in block], role=role)
                bar.update(len(block))
            vectors_bank.append(keys[shard], vectors_UD[shard])
    _log.info(
        "%s texts: %d, unique %d, encoded %d, reused %d, cut to the limit so far %d",
        role,
        len(texts),
        len(keys),
        len(missing),
        len(keys) - len(missing),
        encoder.num_truncated,
    )
    return vectors_UD[inverse]
