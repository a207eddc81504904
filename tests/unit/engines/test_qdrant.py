"""Qdrant's own engine over an exported shard, and over the upserts that a server would get."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

edge = pytest.importorskip("qdrant_edge", reason="qdrant-edge-py is not installed: make setup EXTRAS=cpu,export")


def test_the_engine_finds_exactly_the_exact_ranking(export: Callable[..., Path], search: dict[str, Any], judged: Any) -> None:
    folder = export("qdrant")

    found, exact = search["qdrant"](folder), judged.exact()

    assert {query_id: ranking.passage_ids for query_id, ranking in found.items()} == {
        query_id: ranking.passage_ids for query_id, ranking in exact.items()
    }
    for query_id, ranking in exact.items():
        assert found[query_id].scores.tolist() == pytest.approx(ranking.scores.tolist(), rel=1e-6)


def test_a_shard_answers_the_same_when_it_is_opened_again(export: Callable[..., Path], search: dict[str, Any]) -> None:
    folder = export("qdrant")

    first, second = search["qdrant"](folder), search["qdrant"](folder)

    assert {q: (r.passage_ids, r.scores.tolist()) for q, r in first.items()} == {
        q: (r.passage_ids, r.scores.tolist()) for q, r in second.items()
    }


def test_weights_in_the_shard_are_bit_equal(export: Callable[..., Path], judged: Any) -> None:
    shard = edge.EdgeShard.load(str(export("qdrant") / "shard"))
    try:
        (point,) = shard.retrieve([3], with_payload=False, with_vector=True)
    finally:
        shard.close()

    row = judged.passage_csr[3].sorted_indices()
    assert point.vector["text"].indices == row.indices.tolist()
    assert point.vector["text"].values == row.data.tolist()


def test_upserts_make_the_same_points(export: Callable[..., Path], judged: Any, tmp_path: Path) -> None:
    folder = export("qdrant-upserts")
    collection = json.loads((folder / "collection.json").read_text(encoding="utf-8"))
    bodies = [json.loads(line) for line in (folder / "upserts.jsonl").read_text(encoding="utf-8").splitlines()]

    assert collection == {"vectors": {}, "sparse_vectors": {"text": {}}}
    points = [point for body in bodies for point in body["points"]]
    assert [point["id"] for point in points] == list(range(60))
    assert [point["payload"] for point in points] == [{"passage_id": passage_id} for passage_id in judged.passage_ids]
    for number, point in enumerate(points):
        row = judged.passage_csr[number].sorted_indices()
        assert point["vector"] == {"text": {"indices": row.indices.tolist(), "values": row.data.tolist()}}


def test_the_engine_takes_the_upserts(
    export: Callable[..., Path], search: dict[str, Any], judged: Any, tmp_path: Path
) -> None:
    folder = export("qdrant-upserts")
    (folder / "shard").mkdir()
    shard = edge.EdgeShard.create(str(folder / "shard"), edge.EdgeConfig(sparse_vectors={"text": edge.EdgeSparseVectorParams()}))
    for line in (folder / "upserts.jsonl").read_text(encoding="utf-8").splitlines():
        points = [
            edge.Point(point["id"], {"text": edge.SparseVector(**point["vector"]["text"])}, point["payload"])
            for point in json.loads(line)["points"]
        ]
        shard.update(edge.UpdateOperation.upsert_points(points))
    shard.close()

    found = search["qdrant"](folder)

    assert {query_id: ranking.passage_ids for query_id, ranking in found.items()} == {
        query_id: ranking.passage_ids for query_id, ranking in judged.exact().items()
    }
