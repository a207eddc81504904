"""What manifests say about their making: enough to make it again, nothing about who or where."""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import platform
import re
import socket
import sys
from pathlib import Path

import pytest

from sparsekd.provenance import command, provenance, versions


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pipeline/evaluate.py", "r.toml"], "python pipeline/evaluate.py r.toml"),
        (["/home/me/clone/pipeline/evaluate.py", "r.toml", "--set", "a.b=1"], "python pipeline/evaluate.py r.toml --set a.b=1"),
        (["/opt/bin/sparsekd", "bank", "ls"], "python sparsekd bank ls"),
    ],
)
def test_a_command_can_be_run_again_in_a_clone(arguments: list[str], expected: str) -> None:
    assert command(arguments) == expected


def test_versions_are_those_installed() -> None:
    found = versions()

    assert found["python"] == platform.python_version()
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["sentence-transformers"] == importlib.metadata.version("sentence-transformers")


def test_provenance_is_json_and_names_no_host_and_no_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "pipeline" / "evaluate.py"), "r.toml", "--set", "training.seed=1"])

    said = provenance(["training.seed=1"])

    text = json.dumps(said)
    assert said["command"] == "python pipeline/evaluate.py r.toml --set training.seed=1"
    assert said["overrides"] == ["training.seed=1"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", said["recorded_at"])
    assert str(tmp_path) not in text
    assert not {socket.gethostname(), getpass.getuser()} & set(re.findall(r"[\w.-]+", text))
