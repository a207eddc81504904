from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekd import artifact
from sparsekd.artifact import (
    MANIFEST,
    IntegrityError,
    differing_fields,
    find,
    key_of,
    make_folder,
    naming,
    nearest,
    publish,
    read_manifest,
    temporary_name,
    verify,
    write_file_atomically,
)

FIELDS: dict[str, Any] = {"stage": 1, "input": {"digest": "00ff", "max_length": 128}}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def make(folder: Path, content: bytes = b"rows", fields: dict[str, Any] | None = None, **extra: Any) -> None:
    with publish(folder, kind="table", fields=fields or FIELDS, extra=extra) as temporary:
        (temporary / "part").mkdir()
        (temporary / "part" / "0.arrow").write_bytes(content)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".tmp-*")]


def test_key_is_pinned() -> None:
    """A key that changes between versions loses every banked score."""
    assert key_of({}) == "44136fa355b3678a"
    assert key_of({"b": [1, "é"], "a": {"x": None, "y": 0.1}}) == "ad27ba552fcf87a3"


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_key_does_not_depend_on_the_order_of_names(fields: dict[str, Any]) -> None:
    assert key_of(fields) == key_of(dict(reversed(fields.items())))


@given(*[st.dictionaries(st.sampled_from(["a", "b", "a.b", ""]), json_values, max_size=3)] * 2)
def test_fields_differ_if_and_only_if_keys_do(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    assert (differing_fields(theirs, ours) == {}) == (key_of(theirs) == key_of(ours))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"bytes"])
def test_key_of_what_json_cannot_say_is_refused(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        key_of({"a": value})


def test_published_folder_is_found_and_verified(tmp_path: Path) -> None:
    make(tmp_path / "a", rows=12)

    found = find(tmp_path / "a", FIELDS)

    assert found is not None
    verify(found)
    assert (found.key, found.manifest["rows"], found.manifest["kind"]) == (key_of(FIELDS), 12, "table")
    assert (found.folder / "part" / "0.arrow").read_bytes() == b"rows"
    assert leftovers(tmp_path) == []


def test_what_was_never_published_is_not_found(tmp_path: Path) -> None:
    assert find(tmp_path / "a", FIELDS) is None


def test_counts_filled_in_while_writing_reach_the_manifest(tmp_path: Path) -> None:
    counts: dict[str, Any] = {}
    with publish(tmp_path / "a", kind="table", fields=FIELDS, extra=counts) as temporary:
        (temporary / "0").write_bytes(b"")
        counts["dropped"] = 3

    assert artifact.read_manifest(tmp_path / "a")["dropped"] == 3


def test_failed_stage_leaves_nothing(tmp_path: Path) -> None:
    def stage() -> None:
        with publish(tmp_path / "a", kind="table", fields=FIELDS, extra={}) as temporary:
            (temporary / "0").write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stage()

    assert list(tmp_path.iterdir()) == []


def test_first_of_two_racing_publishers_stands(tmp_path: Path) -> None:
    with publish(tmp_path / "a", kind="table", fields=FIELDS, extra={}) as temporary:
        (temporary / "late").write_bytes(b"late")
        make(tmp_path / "a", b"first")

    found = find(tmp_path / "a", FIELDS)
    assert found is not None
    assert sorted(found.manifest["files"]) == ["part/0.arrow"]
    assert leftovers(tmp_path) == []


def test_folder_made_from_other_fields_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a", fields={**FIELDS, "stage": 2})

    with pytest.raises(IntegrityError, match=f"made from key .*, expected {key_of(FIELDS)}; remove the folder and rerun"):
        find(tmp_path / "a", FIELDS)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b'"manifest"', b"\xff"])
def test_folder_without_a_readable_manifest_is_refused(tmp_path: Path, content: bytes | None) -> None:
    make(tmp_path / "a")
    manifest = tmp_path / "a" / "manifest.json"
    manifest.unlink()
    if content is not None:
        manifest.write_bytes(content)

    with pytest.raises(IntegrityError, match=r"manifest.json: (missing|not a manifest)"):
        find(tmp_path / "a", FIELDS)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", ""])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    with publish(tmp_path / "a", kind="x", fields={"a": 1}, extra={}) as temporary:
        (temporary / "data").write_text("x", encoding="utf-8")
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"][name] = manifest["files"]["data"]
    (tmp_path / "a" / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")

    with pytest.raises(IntegrityError, match=r"manifest\.json: not a manifest \(key or files are not what publish writes\)"):
        find(tmp_path / "a", {"a": 1})


def test_a_link_in_an_artifact_is_refused(tmp_path: Path) -> None:
    with publish(tmp_path / "a", kind="x", fields={"a": 1}, extra={}) as temporary:
        (temporary / "data").write_text("x", encoding="utf-8")
    (tmp_path / "a" / "data").rename(tmp_path / "elsewhere")
    (tmp_path / "a" / "data").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(IntegrityError, match=r"data: a symbolic link, expected a file of its own"):
        find(tmp_path / "a", {"a": 1})


@pytest.mark.parametrize("files", [[], {"a": 1}, {"a": {}}, {"a": {"bytes": "1", "xxh3_128": "x"}}, None, "x"], ids=repr)
def test_a_manifest_of_another_shape_is_refused(tmp_path: Path, files: Any) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"key": "x", "files": files}), encoding="utf-8")

    with pytest.raises(IntegrityError, match="not a manifest"):
        find(tmp_path, {})


def test_missing_cut_and_changed_files_are_named(tmp_path: Path) -> None:
    for name in ("missing", "cut", "changed"):
        make(tmp_path / name)
    (tmp_path / "missing" / "part" / "0.arrow").unlink()
    (tmp_path / "cut" / "part" / "0.arrow").write_bytes(b"row")
    (tmp_path / "changed" / "part" / "0.arrow").write_bytes(b"Rows")
    changed = find(tmp_path / "changed", FIELDS)

    with pytest.raises(IntegrityError, match=r"missing/part/0.arrow: missing, its manifest lists it"):
        find(tmp_path / "missing", FIELDS)
    with pytest.raises(IntegrityError, match=r"cut/part/0.arrow: 3 bytes, its manifest says 4"):
        find(tmp_path / "cut", FIELDS)
    assert changed is not None
    with pytest.raises(IntegrityError, match=r"changed/part/0.arrow: checksum .*, its manifest says "):
        verify(changed)


def test_a_manifest_whose_counts_were_edited_is_refused_and_one_from_before_seals_is_not(tmp_path: Path) -> None:
    make(tmp_path / "a", counts={1: 12, 2: (0.5,)})
    path = tmp_path / "a" / MANIFEST
    told = json.loads(path.read_text(encoding="utf-8"))

    path.write_text(json.dumps({**told, "counts": {"1": 13, "2": [0.5]}}), encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"manifest\.json: .*changed since it was written, its own seal does not fit"):
        find(tmp_path / "a", FIELDS)
    path.write_text(json.dumps({name: value for name, value in told.items() if name != "seal"}), encoding="utf-8")

    assert read_manifest(tmp_path / "a")["counts"] == {"1": 12, "2": [0.5]}


def test_what_a_killed_process_left_of_a_key_goes_when_the_key_is_published(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / temporary_name("a").replace(f"-{os.getpid()}-", f"-{dead.pid}-")
    (left / "part").mkdir(parents=True)
    being_made = tmp_path / temporary_name("a")
    being_made.mkdir()

    make(tmp_path / "a")

    assert [left.exists(), being_made.exists()] == [False, True]


def test_an_error_of_the_disk_names_the_file_and_another_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: 'somewhere'"), naming(Path("somewhere")):
        raise OSError(errno.ENOSPC, "Error writing bytes to file. Detail: a library's")
    with pytest.raises(OSError, match=r"No such file or directory: .*gone'"), naming(Path("somewhere")):
        (tmp_path / "gone").read_bytes()
    with pytest.raises(OSError, match=r"^a library's$"), naming(Path("somewhere")):
        raise OSError("a library's")


def test_every_folder_that_is_made_is_flushed_into_the_one_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(artifact, "fsync_path", flushed.append)

    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")

    assert flushed == [tmp_path, tmp_path / "a"]
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        make_folder(tmp_path / "file" / "a")


@pytest.mark.parametrize("name", ["fsync", "replace", "rename"])
def test_disk_failure_at_any_call_publishes_whole_or_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Any] = getattr(os, name)
    for number in range(50):
        calls = iter(range(1000))

        def failing(*arguments: Any, calls: Any = calls, number: int = number, **keywords: Any) -> Any:
            if next(calls) >= number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments, **keywords)

        folder = tmp_path / f"{number}"
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            try:
                make(folder)
                break
            except OSError:
                pass
        found = find(folder, FIELDS)
        assert found is None or verify(found) is None
        assert leftovers(tmp_path) == []

    assert 0 < number < 49


def test_file_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new folder" / "file"
    write_file_atomically(path, b"old")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_file_atomically(path, b"new")

    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_temporary_name_tells_whose_it_is(tmp_path: Path) -> None:
    ours = tmp_path / artifact.temporary_name("a-b")
    ours.write_bytes(b"")
    os.utime(ours, (0, 0))
    foreign = tmp_path / f".tmp-a-not-{socket.gethostname()}x-1-0"

    assert not artifact.is_abandoned(ours), "this process lives"
    assert not artifact.is_abandoned(foreign), "published meanwhile"
    foreign.write_bytes(b"")
    assert not artifact.is_abandoned(foreign), "another host's, new"
    os.utime(foreign, (0, 0))
    assert artifact.is_abandoned(foreign)


def test_nearest_folder_is_the_one_with_fewest_differences(tmp_path: Path) -> None:
    make(tmp_path / "far", fields={"stage": 2, "input": {"digest": "11", "max_length": 64}})
    make(tmp_path / "near", fields={"stage": 1, "input": {"digest": "00ff", "max_length": 64}})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_bytes(b"{")

    assert nearest(tmp_path, FIELDS) == (tmp_path / "near", {"input.max_length": (64, 128)})
    assert nearest(tmp_path / "nothing", FIELDS) is None


def test_missing_and_null_fields_and_lists_of_other_length_are_differences() -> None:
    assert differing_fields({"a": None}, {}) == {"a": (None, "(absent)")}
    assert differing_fields({"a": [1, 2]}, {"a": [1]}) == {"a": ([1, 2], [1])}
    assert differing_fields({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == {"a.1.b": (2, 3)}
    assert differing_fields({"a": 1}, {"a": True}) == {"a": (1, True)}
    assert differing_fields({"a": (1, 2)}, {"a": [1, 2]}) == {}, "JSON knows no tuples"
