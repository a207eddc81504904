"""Benchmarks as `make bench` runs them: to the end, with figures that can be checked without a clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sparsekd

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]


def run_quick(script: str, *arguments: str) -> dict[str, Any]:
    """Return the figures that a small run of a benchmark ends with."""
    environment = os.environ | {"PYTHONPATH": str(Path(sparsekd.__file__).parents[1])}
    command = [sys.executable, str(BENCHMARKS / script), "--quick", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def test_search_is_exact_over_vectors_as_they_are_said_to_be() -> None:
    figures = run_quick("search.py", "--without-seismic")

    assert figures["passages"] == 2_000
    assert figures["passage_active_dims"] == pytest.approx(120, rel=0.02)
    assert figures["query_active_dims"] == pytest.approx(30, rel=0.05)
    assert figures["ours"]["overlap"] == figures["scipy"]["overlap"] == 1
    assert figures["ours"]["queries_per_s"] > 0
    assert figures["ours"]["index_mb"] > 2_000 * 120 * 8 / 2**20
    assert "seismic" not in figures


def test_search_runs_over_seismic_too() -> None:
    pytest.importorskip("seismic")

    figures = run_quick("search.py")

    assert figures["seismic"]["overlap"] >= 0.95
    assert figures["seismic"]["index_mb"] > 0


def test_scale_fills_asks_and_finds_again_and_draws(tmp_path: Path) -> None:
    figures = run_quick("scale.py", "--plot", str(tmp_path / "scale.svg"), "--folder", str(tmp_path))

    assert [bank["pairs"] for bank in figures["bank"]] == [100_000, 200_000]
    assert all(20 <= bank["bytes_per_pair"] < 22 for bank in figures["bank"])
    assert figures["table"]["rows"] == 50_000 // 9
    assert "look-up, by query" in (tmp_path / "scale.svg").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["scale.svg"], "what it filled is removed"
