from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

import sparsekd
from sparsekd.artifact import key_of
from sparsekd.bank import EmbeddingBank, ScoreBank, text_keys
from sparsekd.cli import app

IDENTITY = {"kind": "cross-encoder", "max_length": 256, "weights": {"model.safetensors": "00"}}
OTHER_IDENTITY = {**IDENTITY, "max_length": 512}
KEY, OTHER_KEY = key_of(IDENTITY), key_of(OTHER_IDENTITY)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with two teachers of 40 pairs in 2 segments each, and an encoder of 5 texts."""
    keys = text_keys(f"text {number}" for number in range(40))
    for identity, reference in ((IDENTITY, "org/reranker"), (OTHER_IDENTITY, "")):
        scores = ScoreBank(tmp_path / "bank", max_segment_pairs=20).open(identity, reference=reference)
        scores.append(keys, keys, np.arange(40, dtype=np.float32))
    EmbeddingBank(tmp_path / "bank").open({"kind": "dense"}).append(keys[:5], np.ones((5, 3), dtype=np.float32))
    return tmp_path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["bank", *map(str, arguments)])


def damage_a_segment(cache: Path) -> Path:
    segment = sorted((cache / "bank" / "scores" / KEY).glob("*.arrow"))[0]
    segment.write_bytes(segment.read_bytes()[:-8])
    return segment


def test_ls_lists_teachers_and_encoders_with_what_they_hold(cache: Path) -> None:
    result = run("ls", "--cache", cache)

    rows = [line.split() for line in result.stdout.splitlines()]
    assert result.exit_code == 0
    assert rows[0][:3] == ["bank", "key", "kind"]
    assert {tuple(row[:5]) for row in rows[1:]} == {
        ("scores", KEY, "cross-encoder", "org/reranker", "40"),
        ("scores", OTHER_KEY, "cross-encoder", "-", "40"),
        ("embeddings", key_of({"kind": "dense"}), "dense", "-", "5"),
    }
    assert rows[1][-1] == "2", "segments"


def test_ls_shows_damaged_folders_among_sound_ones(cache: Path) -> None:
    (cache / "bank" / "scores" / KEY / "manifest.json").write_bytes(b"{}")

    result = run("ls", "--cache", cache)

    assert result.exit_code == 0
    assert result.stdout.count("DAMAGED: sparsekd bank verify") == 1
    assert OTHER_KEY in result.stdout


def test_info_prints_the_identity_and_the_segments(cache: Path) -> None:
    result = run("info", KEY[:6], "--cache", cache)

    assert result.exit_code == 0
    assert '"max_length": 256' in result.stdout
    assert "40 pairs, " in result.stdout
    assert result.stdout.count(".arrow") == 2


def test_explain_says_which_identity_fields_differ(cache: Path) -> None:
    result = run("explain", KEY[:6], OTHER_KEY[:6], "--cache", cache)

    assert [line.split() for line in result.stdout.splitlines()] == [
        ["field", f"scores/{KEY}", f"scores/{OTHER_KEY}"],
        ["max_length", "256", "512"],
    ]
    assert "have the same identity" in run("explain", KEY, KEY, "--cache", cache).stdout


def test_verify_exits_one_and_names_the_damaged_file(cache: Path) -> None:
    assert run("verify", "--cache", cache).exit_code == 0
    segment = damage_a_segment(cache)

    result = run("verify", "--cache", cache)

    assert result.exit_code == 1
    assert segment.name in result.stdout
    assert f"{OTHER_KEY}: sound, 40 pairs" in result.stdout
    assert run("verify", OTHER_KEY, "--cache", cache).exit_code == 0


def test_repair_leaves_a_sound_bank_with_what_was_sound(cache: Path) -> None:
    segment = damage_a_segment(cache)

    result = run("repair", KEY, "--cache", cache)

    assert result.exit_code == 0
    assert segment.name in result.stdout
    assert result.stdout.splitlines()[-1].endswith(f"{KEY}: repaired, 1 segments with 20 rows")
    assert run("verify", "--cache", cache).exit_code == 0
    assert "sound, 2 segments with 40 rows" in run("repair", OTHER_KEY, "--cache", cache).stdout


def test_gc_says_what_it_would_remove_then_removes_it(cache: Path) -> None:
    leftover = cache / "bank" / "scores" / KEY / ".tmp-segment-another-host-1-00000000"
    leftover.write_bytes(b"12345")
    os.utime(leftover, (0, 0))

    dry = run("gc", "--dry-run", "--cache", cache)
    assert leftover.exists()
    wet = run("gc", "--cache", cache)

    assert dry.stdout.splitlines()[-1] == "would remove 1 leftovers, 5 bytes"
    assert wet.stdout.splitlines()[-1] == "removed 1 leftovers, 5 bytes"
    assert str(leftover) in wet.stdout
    assert not leftover.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "zz"], "'zz' fits no key; there are: "),
        (["verify", "zz"], "'zz' fits no key"),
        (["explain", "", "zz"], "'' fits 3 keys"),
    ],
)
def test_bad_input_exits_two_with_one_line(cache: Path, arguments: list[str], message: str) -> None:
    result = run(*arguments, "--cache", cache)

    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["ls"], ["verify"], ["repair"], ["gc"], ["info", "a"], ["explain", "a", "b"]])
def test_cache_without_a_bank_exits_two_with_one_line(tmp_path: Path, arguments: list[str]) -> None:
    result = run(*arguments, "--cache", tmp_path)

    assert result.exit_code == 2
    expected = "no bank here; give the cache folder of your recipes with --cache, or score something first"
    assert result.stderr == f"sparsekd: {tmp_path / 'bank'}: {expected}\n"


def test_info_of_a_damaged_folder_exits_one_and_says_what_to_run(cache: Path) -> None:
    (cache / "bank" / "scores" / KEY / "manifest.json").unlink()

    result = run("info", KEY, "--cache", cache)

    assert result.exit_code == 1
    assert result.stderr.endswith(f"missing; run: sparsekd bank repair {KEY} --cache {cache}\n")


def test_command_line_imports_no_torch_and_no_pandas(cache: Path) -> None:
    code = (
        "import sys; from sparsekd.cli import app; app(['bank', 'verify', '--cache', sys.argv[1]], standalone_mode=False); "
        "print('modules', *sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(sparsekd.__file__).parents[1])}

    done = subprocess.run([sys.executable, "-c", code, str(cache)], capture_output=True, text=True, check=True, env=environment)

    assert not {"torch", "transformers", "pandas", "scipy"} & set(done.stdout.splitlines()[-1].split())
