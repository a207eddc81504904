"""A worker for the tests: ask the bank, score what is missing, append, shard after shard; says each shard that is stored.

    python fill_bank.py ROOT NUM_SHARDS PAIRS_PER_SHARD STRIDE

Shard k holds pairs k * STRIDE + 0 .. PAIRS_PER_SHARD - 1 of the key space, so a stride below the size makes shards overlap.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from sparsekd.bank import ScoreBank


def keys_of(numbers: np.ndarray, salt: int) -> np.ndarray:
    """Return well-spread distinct keys (splitmix64) without hashing texts: the worker must spend its time in the bank."""
    mixed = (numbers.astype(np.uint64) + np.uint64(salt)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(31)
    mixed *= np.uint64(0x94D049BB133111EB)
    return np.stack((mixed ^ (mixed >> np.uint64(29)), mixed), axis=1)


def pairs_of(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return query keys, passage keys and scores; ten passages a query."""
    return keys_of(numbers // 10, 1), keys_of(numbers, 1 << 40), np.sqrt(numbers).astype(np.float32)


def main() -> None:
    """Fill the bank."""
    root, num_shards, size, stride = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    print("ready", flush=True)
    scores = ScoreBank(root).open({"worker": 1})
    for shard in range(num_shards):
        query_keys, passage_keys, gold_sim = pairs_of(np.arange(shard * stride, shard * stride + size))
        missing = np.isnan(scores.lookup(query_keys, passage_keys))
        scores.append(query_keys[missing], passage_keys[missing], gold_sim[missing])
        print(shard, flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main()
