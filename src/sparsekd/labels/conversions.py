"""Conversions between label forms, as pure functions: each one is asked for by name, none happens on the way.

Score lists become margins, n-tuples become triplets (ids and scores alike), class labels become triplets by a seeded draw.
R rows, N passages per row positive first, M = N−1 negatives, T triplets.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]


def margins(gold_sim_RN: NDArray[Any]) -> NDArray[Any]:
    """Return [R, M], gold_sim(positive) − gold_sim(negative), signed, in the dtype given; ValueError without a negative.

    >>> margins(np.array([[8.0, 2.0, 9.0]])).tolist()
    [[6.0, -1.0]]
    """
    _require_negatives("margins", gold_sim_RN.shape[1])
    difference: NDArray[Any] = gold_sim_RN[:, :1] - gold_sim_RN[:, 1:]
    return difference


def triplet_ids(query_ids: Sequence[str], passage_ids: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Return the R · M rows (query, [positive, negative]), row by row, negatives in order; ValueError without a negative.

    >>> triplet_ids(["q"], [["x", "a", "b"]])
    (['q', 'q'], [['x', 'a'], ['x', 'b']])
    """
    for passages in passage_ids:
        _require_negatives("triplets", len(passages))
    pairs = [(query_id, [passages[0], other]) for query_id, passages in zip(query_ids, passage_ids, strict=True)
             for other in passages[1:]]  # fmt: skip
    return [query_id for query_id, _ in pairs], [passages for _, passages in pairs]


def triplet_scores(gold_sim_RN: NDArray[Any]) -> NDArray[Any]:
    """Return [R · M, 2], [gold_sim(positive), gold_sim(negative)], in the order of ``triplet_ids``.

    >>> triplet_scores(np.array([[8.0, 2.0, 9.0]])).tolist()
    [[8.0, 2.0], [8.0, 9.0]]
    """
    _require_negatives("triplets", gold_sim_RN.shape[1])
    num_negatives = gold_sim_RN.shape[1] - 1
    return np.stack([np.repeat(gold_sim_RN[:, 0], num_negatives), gold_sim_RN[:, 1:].reshape(-1)], axis=1)


def class_triplets(classes: Sequence[Hashable], seed: int) -> NDArray[np.int64]:
    """Return int64 [T, 3]: positions of anchor, positive and negative, one triplet per text that can be an anchor.

    The positive is another text of the anchor's class, the negative a text of another class, each drawn uniformly under
    ``seed``. A text alone in its class is no anchor, so ``len(classes) − T`` texts are left out; the caller counts them.
    Raises ValueError if there is one class only, or every text is alone in its class.

    >>> class_triplets(["cat", "dog", "cat"], seed=0).tolist()
    [[0, 2, 1], [2, 0, 1]]
    """
    place_by_class = {name: place for place, name in enumerate(dict.fromkeys(classes))}
    codes = np.array([place_by_class[name] for name in classes], dtype=np.int64)
    sizes = np.bincount(codes, minlength=1)
    anchors = np.flatnonzero(sizes[codes] > 1) if len(codes) else codes
    if len(place_by_class) < 2 or not anchors.size:
        raise ValueError(
            f"triplets of class labels: {len(classes)} texts in {len(place_by_class)} classes, {anchors.size} of them with another "
            "of their class; expected two classes or more, one of them with two texts or more"
        )
    # Texts of one class lie side by side in `order`, from starts[class] on; the others are what is left of and right of them.
    order = np.argsort(codes, kind="stable")
    starts = np.concatenate(([0], np.cumsum(sizes)))[:-1]
    rank = np.empty(len(codes), dtype=np.int64)
    rank[order] = np.arange(len(codes)) - starts[codes[order]]
    generator, own = np.random.default_rng(seed), codes[anchors]
    step = generator.integers(1, sizes[own])  # around the class, never back to the anchor
    positives = order[starts[own] + (rank[anchors] + step) % sizes[own]]
    draw = generator.integers(0, len(codes) - sizes[own])
    negatives = order[np.where(draw < starts[own], draw, draw + sizes[own])]
    return np.stack([anchors, positives, negatives], axis=1)


def _require_negatives(what: str, num_passages: int) -> None:
    if num_passages < 2:
        raise ValueError(f"{what} need a positive and at least one negative per row, found {num_passages} passages; raise "
                         "[labels] num_negatives")  # fmt: skip
