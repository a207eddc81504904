"""Seismic's own engine over an exported index."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from sparsekd.artifact import read_manifest
from sparsekd.engines.seismic import LARGE_VOCABULARY
from sparsekd.engines.vectors import Source, Vectors

seismic = pytest.importorskip("seismic", reason="pyseismic-lsr is not installed: make setup EXTRAS=cpu,export")


def test_the_engine_finds_the_exact_ranking(export: Callable[..., Path], search: dict[str, Any], judged: Any) -> None:
    folder = export("seismic")

    found = search["seismic"](folder)

    assert judged.overlap(found) >= 0.95
    for query_id, ranking in judged.exact().items():
        assert found[query_id].scores[0] == pytest.approx(ranking.scores[0], rel=1e-3)


def test_terms_that_are_hard_to_write_are_found(export: Callable[..., Path], judged: Any) -> None:
    index = seismic.SeismicIndex.load(str(export("seismic") / "passages.index.seismic"))
    string = seismic.get_seismic_string()

    for dim, term in enumerate(judged.terms[:13]):
        (hit,) = index.search("q", np.array([term], string), np.ones(1, np.float32), k=1, query_cut=10, heap_factor=0.0)
        assert hit[1] == pytest.approx(judged.passage_csr[:, dim].max(), rel=1e-3)


def test_the_index_holds_the_half_precision_weights_that_the_manifest_accounts_for(
    export: Callable[..., Path], judged: Any
) -> None:
    folder = export("seismic")
    index = seismic.SeismicIndex.load(str(folder / "passages.index.seismic"))
    kept, errors = [], []
    for number in range(60):
        weights = judged.passage_csr[number].data.astype(np.float64)
        stored = np.sort(weights.astype(np.float16))
        assert np.sort(index.get(number)[1]).tolist() == stored.tolist()
        kept.append(stored)
        errors.append(np.abs(weights.astype(np.float16) - weights) / weights)

    found = read_manifest(folder)["quantisation"]

    every = np.concatenate(errors)
    assert (found["passages"], found["empty_passages"], found["weights"]) == (60, 1, len(every))
    assert found["mean_relative_error"] == pytest.approx(every.mean())
    assert found["max_relative_error"] == pytest.approx(every.max())
    assert 0 < found["max_relative_error"] < 2**-10


def test_the_terms_file_names_every_dim(export: Callable[..., Path], judged: Any) -> None:
    assert json.loads((export("seismic") / "terms.json").read_text(encoding="utf-8")) == judged.terms


def test_dims_without_terms_are_named_by_their_number(
    export: Callable[..., Path], search: dict[str, Any], judged: Any
) -> None:
    folder = export("seismic", judged.source(terms=None))

    assert judged.overlap(search["seismic"](folder)) >= 0.95
    assert json.loads((folder / "terms.json").read_text(encoding="utf-8")) == [str(dim) for dim in range(64)]


def test_more_terms_than_16_bits_tell_apart_are_all_found(export: Callable[..., Path]) -> None:
    width = LARGE_VOCABULARY + 2
    dims = [0, LARGE_VOCABULARY, LARGE_VOCABULARY + 1]
    passage_csr = scipy.sparse.csr_matrix((np.ones(3, np.float32), np.array(dims, np.int32), np.arange(4)), shape=(3, width))
    source = Source(Vectors([f"p{dim}" for dim in dims], [passage_csr]), width, None)
    index = seismic.SeismicIndexLV.load(str(export("seismic", source) / "passages.index.seismic"))
    string = seismic.get_seismic_string()

    for dim in dims:
        hits = index.search("q", np.array([str(dim)], string), np.ones(1, np.float32), k=2, query_cut=1, heap_factor=1.0)
        assert hits == [("q", 1.0, f"p{dim}")]


def test_nothing_of_the_build_goes_to_stdout(export: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    export("seismic")

    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Building" in captured.err


def test_a_weight_above_half_precision_is_refused_and_nothing_is_left(
    export: Callable[..., Path], judged: Any, tmp_path: Path
) -> None:
    heavy = replace(judged, passage_csr=judged.passage_csr * np.float32(1e6))

    with pytest.raises(ValueError, match="the engine holds half-precision weights, at most 65504"):
        export("seismic", heavy.source())
    assert list(tmp_path.iterdir()) == []


def test_a_term_longer_than_the_package_holds_is_refused(export: Callable[..., Path], judged: Any) -> None:
    with pytest.raises(ValueError, match=r"dim 0: the engine cannot hold its term 'xxx.*expected at most 100 characters"):
        export("seismic", judged.source(terms=["x" * 101, *judged.terms[1:]]))
