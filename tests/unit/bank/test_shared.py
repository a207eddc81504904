"""A bank that others can write to: nothing in it is opened, moved, removed or printed that it does not prove to be its own.

Checksums are no signatures, so everything here is forged with right ones.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse
import xxhash
from typer.testing import CliRunner

from sparsekd.artifact import IntegrityError, temporary_name
from sparsekd.bank import EmbeddingBank, text_keys, upkeep
from sparsekd.bank.manifest import Manifest, read_manifest, write_manifest
from sparsekd.bank.segment import Owner, SegmentEntry, write_segment
from sparsekd.bank.sparse import SparseBank
from sparsekd.cli import app


def forge(folder: Path, identity: dict[str, Any], batch: pa.RecordBatch, rows: int) -> Path:
    """List one segment of ``batch`` alone, with every checksum right."""
    temporary, entry = write_segment(folder, batch, rows, Owner(folder.parent.name, folder.name, identity))
    temporary.replace(folder / entry.name)
    write_manifest(folder, Manifest(folder.parent.name, folder.name, 1, "", (entry,)))
    return folder / entry.name


def batch_of(folder: Path) -> pa.RecordBatch:
    [entry] = read_manifest(folder).segments
    with pa.ipc.open_file(str(folder / entry.name)) as reader:
        return reader.get_batch(0).replace_schema_metadata(None)


def scores_of(q: list[int], offsets: list[int], p: list[int], gold_sim: list[float | None]) -> pa.RecordBatch:
    values = pa.StructArray.from_arrays(
        [pa.array(p, pa.uint64()), pa.array(p, pa.uint64()), pa.array(gold_sim, pa.float32())], ["p0", "p1", "gold_sim"]
    )
    passages = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
    return pa.RecordBatch.from_arrays([pa.array(q, pa.uint64()), pa.array(q, pa.uint64()), passages], ["q0", "q1", "passages"])


FORGED: dict[str, tuple[pa.RecordBatch, str]] = {
    "other columns": (pa.record_batch([pa.array([1])], ["q0"]), "columns {'q0': DataType(int64)}"),
    "NaN": (scores_of([1], [0, 1], [1], [float("nan")]), "a score that is not finite"),
    "infinity": (scores_of([1], [0, 1], [1], [float("inf")]), "a score that is not finite"),
    "null": (scores_of([1], [0, 1], [1], [None]), "a null"),
    "queries out of order": (scores_of([2, 1], [0, 1, 2], [1, 1], [1.0, 2.0]), "queries out of order"),
    "a query twice": (scores_of([1, 1], [0, 1, 2], [1, 1], [1.0, 2.0]), "queries out of order"),
    "passages out of order": (scores_of([1], [0, 2], [2, 1], [1.0, 2.0]), "passages out of order"),
    "a pair twice": (scores_of([1], [0, 2], [1, 1], [1.0, 2.0]), "passages out of order"),
    "a query without passages": (scores_of([1, 2], [0, 0, 1], [1], [1.0]), "a query without passages"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_segment_that_no_append_would_write_is_refused_and_repaired_away(sample: Any, name: str) -> None:
    folder = sample.fill().folder
    batch, fault = FORGED[name]
    path = forge(folder, sample.identity, batch, 1)

    with pytest.raises(IntegrityError) as caught:
        sample.answers(sample.open(), [0])
    damage, repaired = upkeep.find_damage(folder), upkeep.repair(folder)

    assert str(caught.value).startswith(f"{path}: {fault}, which nothing here writes; run: sparsekd bank repair")
    assert damage == [f"{path}: {fault}, which nothing here writes"]
    assert repaired.num_segments == 0


def test_offsets_beyond_their_buffer_are_refused(sample: Any) -> None:
    folder = sample.fill().folder
    path = forge(folder, sample.identity, scores_of([1, 2], [0, 33, 77], [*range(33), *range(44)], [1.0] * 77), 77)
    right, wrong = (np.array(offsets, np.int32).tobytes() for offsets in ([0, 33, 77], [0, 33, 1 << 30]))
    content = path.read_bytes()
    assert content.count(right) == 1
    content = content.replace(right, wrong)
    other = folder / f"{xxhash.xxh3_128_hexdigest(content)}.arrow"
    other.write_bytes(content)
    write_manifest(folder, Manifest("scores", folder.name, 2, "", (SegmentEntry(other.name, 1 << 30, len(content)),)))

    with pytest.raises(IntegrityError, match="not an Arrow file"):
        sample.answers(sample.open(), [0])


@pytest.mark.parametrize("kind", ["embeddings", "sparse"])
@pytest.mark.parametrize("damage", ["order", "nan", "column"])
def test_vectors_that_no_append_would_write_are_refused(tmp_path: Path, kind: str, damage: str) -> None:
    keys, identity = text_keys(["a", "b"]), {"encoder": "x"}
    if kind == "embeddings":
        EmbeddingBank(tmp_path).open(identity).append(keys, np.ones((2, 3), dtype=np.float32))
    else:
        SparseBank(tmp_path).open(identity).append(keys, scipy.sparse.csr_matrix(np.ones((2, 3), dtype=np.float32)))
    [folder] = (tmp_path / kind).iterdir()
    batch = batch_of(folder)
    if damage == "order":
        columns = [batch.column(0).take(pa.array([1, 0])), batch.column(1).take(pa.array([1, 0])), *batch.columns[2:]]
    elif damage == "nan":
        flat = pa.array([float("nan")] * 6, pa.float32())
        lists = pa.ListArray.from_arrays(pa.array([0, 3, 6], pa.int32()), flat)
        last = pa.FixedSizeListArray.from_arrays(flat, 3) if kind == "embeddings" else lists
        columns = [*batch.columns[:-1], last]
    else:
        columns = [*batch.columns[:-1], pa.array([1, 2])]
    schema = batch.schema.set(len(columns) - 1, batch.schema.field(len(columns) - 1).with_type(columns[-1].type))
    forge(folder, identity, pa.RecordBatch.from_arrays(columns, schema=schema), 2)

    [line] = upkeep.find_damage(folder)

    assert line.endswith(", which nothing here writes")
    with pytest.raises(IntegrityError, match="which nothing here writes"):
        (EmbeddingBank if kind == "embeddings" else SparseBank)(tmp_path).open(identity).lookup(keys)


@pytest.mark.parametrize("name", ["../../../victim.arrow", "/etc/passwd", "manifest.json", "damaged/0.arrow", "", "\x1b[31m", 7])
def test_a_manifest_that_lists_what_is_no_segment_moves_nothing(sample: Any, name: Any) -> None:
    folder = sample.fill().folder
    victim = sample.root.parent / "victim.arrow"
    victim.write_text("precious", encoding="utf-8")
    state = read_manifest(folder)
    write_manifest(folder, Manifest(state.kind, state.key, 9, state.schema, (SegmentEntry(name, 1, 8), *state.segments)))

    with pytest.raises(IntegrityError, match=r"which names no segment of this folder; run: sparsekd bank repair") as caught:
        sample.open()
    repaired = upkeep.repair(folder)

    assert str(caught.value).isprintable()
    assert (repaired.num_segments, repaired.num_rows) == (3, 300)
    assert victim.read_text(encoding="utf-8") == "precious"


def link(path: Path, target: Path) -> None:
    path.rename(target)
    path.symlink_to(target)


def pipe(path: Path, target: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("replace", [link, pipe])
def test_a_segment_that_is_a_link_or_a_pipe_is_refused_without_waiting(
    sample: Any, tmp_path: Path, replace: Callable[[Path, Path], None]
) -> None:
    scores = sample.fill()
    path = sample.segments(scores)[0]
    replace(path, tmp_path / path.name)
    said: list[str] = []

    def ask() -> None:
        try:
            sample.answers(sample.open(), [0])
        except IntegrityError as error:
            said.append(str(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(20)

    assert [line.partition(";")[0] for line in said] == [f"{path}: no regular file, expected a segment"]


def test_a_lock_that_is_a_link_makes_no_file_elsewhere(sample: Any, tmp_path: Path) -> None:
    scores = sample.fill()
    lock = scores.folder / ".lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(OSError, match=r"\.lock"):
        scores.append(*sample.pairs([1000]))

    assert not (tmp_path / "elsewhere").exists()


def test_sweeping_a_leftover_that_is_a_link_leaves_what_it_leads_to(sample: Any, tmp_path: Path) -> None:
    folder = sample.fill().folder
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x", encoding="utf-8")
    left = folder / temporary_name("x").replace(str(os.getpid()), "99999999")
    left.symlink_to(precious)

    [leftover] = upkeep.find_leftovers(sample.root)
    upkeep.remove(leftover)

    assert leftover.path == left
    assert not left.is_symlink()
    assert (precious / "thesis.tex").exists()


def test_names_in_a_shared_bank_do_not_drive_a_terminal(sample: Any) -> None:
    folder = sample.fill({**sample.identity, "kind": "\x9b31m\u202e"}).folder
    (folder / "reference.txt").write_text("\x1b]0;owned\x07 é", encoding="utf-8")

    for arguments in (["ls"], ["info", folder.name]):
        said = CliRunner().invoke(app, ["bank", *arguments, "--cache", str(sample.root.parent)])
        assert said.exit_code == 0
        assert all(line.isprintable() for line in said.stdout.split("\n"))
        assert json.dumps("\\x9b31m\\u202e")[1:-1].replace("\\\\", "\\") in said.stdout
