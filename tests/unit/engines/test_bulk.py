"""Bulk bodies for Elasticsearch and OpenSearch, held to the documented schema: no server of theirs runs here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.artifact import read_manifest
from sparsekd.engines import bulk
from sparsekd.engines.quantisation import as_feature_values
from sparsekd.engines.vectors import Vectors

ENGINES = ("elasticsearch", "opensearch")


def pairs_of(folder: Path) -> list[tuple[Any, Any]]:
    """Return (action, document) of every body, read as the bulk API reads it: lines in pairs, the last with its newline."""
    pairs = []
    for path in sorted(folder.glob("bulk-*.ndjson")):
        content = path.read_bytes()
        assert content.endswith(b"\n")
        lines = [json.loads(line) for line in content.split(b"\n")[:-1]]
        assert len(lines) % 2 == 0
        pairs += list(zip(lines[::2], lines[1::2], strict=True))
    return pairs


@pytest.mark.parametrize("engine", ENGINES)
def test_every_passage_is_a_pair_of_lines_with_its_weights(engine: str, export: Callable[..., Path], judged: Any) -> None:
    folder = export(engine)
    names = json.loads((folder / "terms.json").read_text(encoding="utf-8"))

    pairs = pairs_of(folder)

    assert [action for action, _ in pairs] == [{"index": {"_id": passage_id}} for passage_id in judged.passage_ids]
    for number, (_, document) in enumerate(pairs):
        row = judged.passage_csr[number].sorted_indices()
        expected = dict(zip([names[dim] for dim in row.indices], row.data.tolist(), strict=True))
        assert document == {"id": f"p{number}", "tokens": expected}


@pytest.mark.parametrize("engine", ENGINES)
def test_queries_call_dims_as_the_documents_do(engine: str, export: Callable[..., Path], judged: Any) -> None:
    folder = export(engine)
    names = json.loads((folder / "terms.json").read_text(encoding="utf-8"))
    queries = [json.loads(line) for line in (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()]

    assert [query["id"] for query in queries] == judged.query_ids
    for number, query in enumerate(queries):
        row = judged.query_csr[number].sorted_indices()
        assert query["vector"] == dict(zip([names[dim] for dim in row.indices], row.data.tolist(), strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_linear_query_over_the_stored_features_ranks_as_the_engine_will(
    engine: str, export: Callable[..., Path], judged: Any
) -> None:
    from sparsekd.evaluation.runs import ranked

    folder = export(engine)
    documents = {document["id"]: document["tokens"] for _, document in pairs_of(folder)}
    found = {}
    for line in (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines():
        query = json.loads(line)
        scores = {
            passage_id: sum(
                weight * float(as_feature_values(np.array([tokens[name]], np.float32))[0])
                for name, weight in query["vector"].items()
                if name in tokens
            )
            for passage_id, tokens in documents.items()
        }
        best = sorted(scores, key=scores.__getitem__, reverse=True)[:10]
        found[query["id"]] = ranked(best, [scores[passage_id] for passage_id in best])

    assert judged.overlap(found) >= 0.97
    assert abs(judged.difference(found)) <= 0.005


def test_elasticsearch_gets_no_dots_in_feature_names(export: Callable[..., Path], judged: Any) -> None:
    names = json.loads((export("elasticsearch") / "terms.json").read_text(encoding="utf-8"))

    assert not any("." in name for name in names)
    assert [names[judged.terms.index(term)] for term in (".", "_", "%2E")] == ["%2E", "_", "%252E"]


def test_opensearch_gets_the_terms_as_they_are(export: Callable[..., Path], judged: Any) -> None:
    assert json.loads((export("opensearch") / "terms.json").read_text(encoding="utf-8")) == judged.terms


def test_mappings_are_those_of_the_documentation(export: Callable[..., Path]) -> None:
    expected = {
        "elasticsearch/mapping-sparse_vector.json": {"type": "sparse_vector", "index_options": {"prune": False}},
        "elasticsearch/mapping-rank_features.json": {"type": "rank_features"},
        "opensearch/mapping.json": {"type": "rank_features"},
    }
    root = export("elasticsearch").parent
    export("opensearch")

    for name, tokens in expected.items():
        mapping = json.loads((root / name).read_text(encoding="utf-8"))
        assert mapping == {"mappings": {"properties": {"id": {"type": "keyword"}, "tokens": tokens}}}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_weight_that_the_engine_refuses_is_left_out_and_counted(engine: str, export: Callable[..., Path], judged: Any) -> None:
    tiny = judged.passage_csr.copy()
    tiny.data[0] = 1e-39

    folder = export(engine, replace(judged, passage_csr=tiny).source())

    (_, first), *_ = pairs_of(folder)
    assert len(first["tokens"]) == 15
    assert all(weight >= 1.1754944e-38 for weight in first["tokens"].values())
    assert read_manifest(folder)["quantisation"]["lost_to_zero"] == pytest.approx(1 / judged.passage_csr.nnz)


def test_bodies_stay_below_their_size_and_hold_whole_pairs(
    export: Callable[..., Path], judged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "_MAX_BODY_BYTES", 2000)

    folder = export("opensearch")

    sizes = [path.stat().st_size for path in folder.glob("bulk-*.ndjson")]
    assert len(sizes) > 5
    assert max(sizes) <= 2000
    assert [document["id"] for _, document in pairs_of(folder)] == judged.passage_ids


def test_an_id_that_is_too_long_is_refused(export: Callable[..., Path], judged: Any, tmp_path: Path) -> None:
    passages = Vectors(["ü" * 257, *judged.passage_ids[1:]], [judged.passage_csr])

    with pytest.raises(ValueError, match="an _id has at most 512 bytes; rename it in the collection"):
        export("elasticsearch", judged.source(passages=passages))
    assert list(tmp_path.iterdir()) == []
