"""What holds for every engine: the target, the manifest, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from sparsekd.artifact import Artifact, read_manifest, verify
from sparsekd.engines.catalogue import ENGINES, Engine, engine_of
from sparsekd.engines.exporting import export_engine
from sparsekd.engines.vectors import Vectors

WRITTEN = [engine for engine in ENGINES.values() if engine.distribution is None]


@pytest.mark.parametrize("engine", WRITTEN, ids=lambda engine: engine.name)
def test_the_same_vectors_give_the_same_bytes_in_blocks_of_any_size(engine: Engine, judged: Any, tmp_path: Path) -> None:
    whole = judged.source(passages=Vectors(judged.passage_ids, [judged.passage_csr]))
    for name, source in (("a", whole), ("b", judged.source())):
        export_engine(engine, source, tmp_path / name, index_key="key")

    assert read_manifest(tmp_path / "a")["files"] == read_manifest(tmp_path / "b")["files"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_manifest_names_engine_index_and_every_file(engine: str, judged: Any, tmp_path: Path) -> None:
    pytest.importorskip(ENGINES[engine].module or "json")
    summary = export_engine(engine_of(engine), judged.source(), tmp_path / "out", index_key="key")

    manifest = read_manifest(tmp_path / "out")
    assert (manifest["kind"], manifest["fields"]["engine"], manifest["fields"]["index"]) == ("export", engine, "key")
    assert manifest["quantisation"] == summary
    assert (summary["passages"], summary["empty_passages"]) == (60, 1)
    verify(Artifact(tmp_path / "out", manifest))


def test_an_existing_target_is_refused_unless_told(judged: Any, tmp_path: Path) -> None:
    def export(**options: Any) -> None:
        export_engine(engine_of("vespa"), judged.source(**options.pop("source", {})), tmp_path / "out", index_key="key", **options)

    export()
    with pytest.raises(ValueError, match="exists already; choose another folder, or replace an earlier export with --overwrite"):
        export()
    export(overwrite=True, source={"queries": None})

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["feed.jsonl", "manifest.json", "passage.sd", "terms.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_export_is_never_replaced(judged: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")

    with pytest.raises(ValueError, match="is no export of this program, so --overwrite leaves it alone"):
        export_engine(engine_of("vespa"), judged.source(), tmp_path, index_key="key", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weight", [np.nan, -1.0])
def test_a_bad_weight_leaves_nothing_behind(engine: str, weight: float, judged: Any, tmp_path: Path) -> None:
    pytest.importorskip(ENGINES[engine].module or "json")
    bad = judged.passage_csr.copy()
    bad.data[-1] = weight
    passages = Vectors(judged.passage_ids, [judged.passage_csr[:30], bad[30:]])

    with pytest.raises(ValueError, match="text 'p59': 1 weights of its block are not finite or below 0"):
        export_engine(engine_of(engine), judged.source(passages=passages), tmp_path / "out", index_key="key")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_queries_of_another_vocabulary_are_refused(engine: str, judged: Any, tmp_path: Path) -> None:
    pytest.importorskip(ENGINES[engine].module or "json")
    queries = Vectors(["q"], [scipy.sparse.csr_matrix(np.ones((1, 63), dtype=np.float32))])

    with pytest.raises(ValueError, match="vectors of 63 dims for an index of 64: they are another student's"):
        export_engine(engine_of(engine), judged.source(queries=queries), tmp_path / "out", index_key="key")
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_is_not_installed_says_how_to_install_it(judged: Any, tmp_path: Path) -> None:
    missing = Engine("seismic", engine_of("seismic").write, "no_such_module", "pyseismic-lsr")

    with pytest.raises(ValueError, match=r"engine seismic: needs the package pyseismic-lsr.*make setup EXTRAS=cpu,export"):
        export_engine(missing, judged.source(), tmp_path / "out", index_key="key")


def test_an_unknown_engine_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="engine 'solr': expected one of seismic, qdrant, qdrant-upserts, anserini"):
        engine_of("solr")
