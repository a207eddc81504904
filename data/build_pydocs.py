"""Build ``pydocs``: retrieval over the API documentation of the Python that runs this, in BEIR layout, without network.

Source files of the standard library and of the distributions that constraints.txt names are parsed with ``ast``, never
imported. Query: the summary of a docstring (its first paragraph). Passage: the qualified name as title, signature and rest of
the docstring as text. Judged by construction: grade 1 for a summary's own passage. Splits are drawn by module, so what is
tested was not seen in training; equal and nearly equal documentation is removed first. The same Python and versions give the
same bytes, whatever the path or the number of processes; a second call is a hit and parses nothing.

Run: python data/build_pydocs.py --out data/collections/pydocs
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import importlib.metadata
import json
import logging
import platform
import re
import shutil
import sys
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from near_duplicates import near_duplicates

from sparsekd import artifact

SUMMARY_CHARACTERS = (15, 300)
"""Shorter summaries name nothing, longer ones are no query."""
MIN_REST_CHARACTERS = 60
"""A passage says something beyond its summary."""
TEST_PERCENT, DEV_PERCENT = 15, 7
SPLIT_SALT = 29
"""Modules are few and of very different size; of salts 0..199 this one comes near 78/7/15 in passages too, with no module above
a sixth of dev or test (Python 3.11, the pins of November 2026)."""

# Tests and vendored copies; what some Python installations leave out (the same bytes everywhere).
SKIPPED_PARTS = {"test", "tests", "conftest", "vendor", "vendored", "externals", "site-packages"}
SKIPPED_STDLIB = {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle", "turtledemo", "venv"}

_WORD = re.compile(r"\w+")
_PARAGRAPH = re.compile(r"\n\s*\n")
# A summary that is a signature, markup or a section instead of a sentence.
_NOT_PROSE = re.compile(r"^[\w.]+\s*\(.*\)(\s*->.*)?$|^\.\.|>>>|:(param|return|type)|[=-]{4}|\b(Args|Parameters|Returns):?$")
# Control characters (whitespace is folded before) and lone surrogates, which no UTF-8 file can hold.
_NOT_TEXT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")

_log = logging.getLogger("build_pydocs")


class Source(NamedTuple):
    """One file to parse."""

    path: str
    module: str
    """Dotted import path."""
    unit: str
    """What a split is drawn by: a standard-library module, or a distribution's module of the second level."""


class Entry(NamedTuple):
    """One documented name."""

    name: str
    unit: str
    signature: str
    summary: str
    rest: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Build or find the collection; print its folder. Return 0, or 2 for an input that cannot be used."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make, e.g. data/collections/pydocs")
    pins = Path(__file__).resolve().parents[1] / "constraints.txt"
    parser.add_argument("--constraints", type=Path, default=pins, help="distributions to read (default: the repository's)")
    parser.add_argument("--processes", type=int, choices=(1, 2, 4, 8), default=2, help="they change no bytes (default: 2)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        make(options.out, options.constraints, options.processes)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    print(options.out)
    return 0


def make(out: Path, constraints: Path, processes: int) -> None:
    """Publish the collection at ``out`` unless the one standing there is sound and was made from the same inputs."""
    started = time.perf_counter()
    distributions = installed_distributions(constraints)
    fields = {
        "builder": builder_digest(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "distributions": {name: distribution.version for name, distribution in distributions.items()},
    }
    if is_hit(out, fields):
        _log.info("pydocs %s: hit, %.1f s", artifact.key_of(fields), time.perf_counter() - started)
        return
    sources = [*standard_library(), *(source for each in distributions.values() for source in distribution_sources(each))]
    entries, counts = read_entries(sources, processes)
    entries = drop_ambiguous(entries, counts)
    extra: dict[str, Any] = {"counts": counts}
    building = out.parent / artifact.temporary_name(out.name)
    with artifact.publish(building, kind="collection", fields=fields, extra=extra) as folder:
        write_beir(folder, entries, counts)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        extra["sha256"] = {path.relative_to(folder).as_posix(): artifact.sha256_of_file(path) for path in files}
    replace(out, building)
    for name, count in sorted(counts.items()):
        _log.info("  %-32s %7d", name, count)
    _log.info("pydocs %s: built, %.1f s", artifact.key_of(fields), time.perf_counter() - started)


def builder_digest() -> str:
    """Return a digest of the code that decides the bytes: an edit rebuilds, in seconds, and nobody has to raise a number."""
    here = Path(__file__).resolve().parent
    return artifact.key_of({name: artifact.sha256_of_file(here / name) for name in ("build_pydocs.py", "near_duplicates.py")})


def is_hit(out: Path, fields: dict[str, Any]) -> bool:
    """Whether ``out`` was made from ``fields`` and its bytes are as published; refuse a folder that is not ours to replace."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        manifest = artifact.read_manifest(out)
        if manifest.get("kind") != "collection" or "builder" not in manifest.get("fields", {}):
            raise ValueError
    except (ValueError, NotADirectoryError) as error:
        raise ValueError(f"{out}: stands and was not made by this builder; give another --out or remove it") from error
    if manifest["key"] != artifact.key_of(fields):
        changed = artifact.differing_fields(manifest["fields"], fields)
        _log.info("rebuilding, changed: %s", ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items()))
        return False
    try:
        artifact.verify(artifact.find(out, fields) or artifact.Artifact(out, manifest))
    except artifact.IntegrityError as error:
        _log.warning("rebuilding, damaged: %s", error)
        return False
    return True


def replace(out: Path, new: Path) -> None:
    """Put ``new`` in the place of ``out`` by renames: nobody meets a folder that is half old and half new."""
    old = out.parent / artifact.temporary_name(out.name)
    try:
        if out.exists():
            out.rename(old)
        new.rename(out)
    except OSError:  # another process did the same a moment ago: its folder stands, ours is dropped
        if not (out / artifact.MANIFEST).is_file():
            raise
    artifact.fsync_path(out.parent)
    for leftover in (old, new):
        shutil.rmtree(leftover, ignore_errors=True)


# --- which files -----------------------------------------------------------------------------------------------------------


def installed_distributions(constraints: Path) -> dict[str, importlib.metadata.Distribution]:
    """The distributions that a constraints file names and this environment has, by normalised name, in name order."""
    if not constraints.is_file():
        raise FileNotFoundError(f"{constraints}: no such file; expected pins like numpy==2.4.6; give --constraints FILE")
    names = set()
    for number, line in enumerate(constraints.read_text(encoding="utf-8").splitlines(), start=1):
        pin = line.partition("#")[0].strip()
        match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*(?=\s*(\[|===?|$))", pin)
        if match:
            names.add(re.sub(r"[-_.]+", "-", match.group()).lower())
        elif pin:
            raise ValueError(f"{constraints}:{number}: found {pin!r}, expected a pin like numpy==2.4.6; correct the line")
    installed = {}
    for name in sorted(names):
        try:
            installed[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            _log.info("%s: pinned, not installed, not read", name)
    return installed


def standard_library() -> Iterator[Source]:
    """Public modules of the standard library, in path order."""
    root = Path(sysconfig.get_path("stdlib"))
    for top in sorted(sys.stdlib_module_names - SKIPPED_STDLIB):
        paths = sorted((root / top).rglob("*.py")) if (root / top).is_dir() else [root / f"{top}.py"]
        for path in paths:
            parts = path.relative_to(root).with_suffix("").parts
            if is_public(parts) and path.is_file():  # a builtin module has no file
                yield Source(str(path), ".".join(parts), top)


def distribution_sources(distribution: importlib.metadata.Distribution) -> Iterator[Source]:
    """Public modules among a distribution's installed files, in path order."""
    name = distribution.metadata["Name"]
    if distribution.files is None:
        raise ValueError(f"{name} {distribution.version}: has no list of files (RECORD); reinstall it with pip")
    for file in sorted(distribution.files, key=str):
        parts = file.with_suffix("").parts
        if file.suffix != ".py" or not is_public(parts):
            continue
        path = Path(str(distribution.locate_file(file)))
        if not path.is_file():
            raise ValueError(f"{name} {distribution.version}: {file} is listed as installed and missing; reinstall it with pip")
        modules = parts[:-1] if parts[-1] == "__init__" else parts
        yield Source(str(path), ".".join(parts), ".".join(modules[:2]))


def is_public(parts: Sequence[str]) -> bool:
    """Whether a module path is read: a private file may define public names (scipy.stats._qmc), a private package may not.

    >>> is_public(("scipy", "stats", "_qmc")), is_public(("pip", "_vendor", "rich")), is_public(("numpy", "tests", "test_all"))
    (True, False, False)
    """
    *packages, stem = parts
    if any(not part.isidentifier() or part in SKIPPED_PARTS for part in parts) or stem == "__main__":
        return False
    return not any(package.startswith("_") for package in packages) and (bool(packages) or not stem.startswith("_"))


# --- what they document ----------------------------------------------------------------------------------------------------


def read_entries(sources: Sequence[Source], processes: int) -> tuple[list[Entry], Counter[str]]:
    """Return the usable documentation of every file, sorted by name, one entry per name, and what was counted."""
    if processes == 1:
        results = list(map(parse, sources))
    else:
        with ProcessPoolExecutor(processes) as pool:
            results = list(pool.map(parse, sources, chunksize=64))
    counts: Counter[str] = Counter(files=len(sources))
    entry_by_name: dict[str, Entry] = {}
    for entries, file_counts in results:
        counts.update(file_counts)
        for entry in entries:
            counts["dropped_name_again"] += entry_by_name.setdefault(entry.name, entry) is not entry
    return [entry_by_name[name] for name in sorted(entry_by_name)], counts


def parse(source: Source) -> tuple[list[Entry], Counter[str]]:
    """Return one file's usable documentation and counts of what was found and dropped."""
    counts: Counter[str] = Counter()
    content = Path(source.path).read_bytes()
    gc.disable()  # a syntax tree has no cycles; collecting while it grows costs a sixth of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(content)
        prefix = ".".join(part for part in source.module.split(".") if not part.startswith("_"))
        return list(entries_of(tree, prefix, source.unit, counts)), counts
    except (SyntaxError, ValueError, RecursionError):
        return [], Counter(files_unparsable=1)
    finally:
        gc.enable()


def entries_of(node: ast.AST, prefix: str, unit: str, counts: Counter[str], *, in_class: bool = False) -> Iterator[Entry]:
    """Yield the public classes and functions of a module or class body, into ``if`` and ``try`` but not into functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try | ast.ExceptHandler):
            yield from entries_of(child, prefix, unit, counts, in_class=in_class)
        elif isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            name = f"{prefix}.{child.name}"
            docstring = ast.get_docstring(child)
            if docstring:
                counts["docstrings"] += 1
                summary, rest = halves(docstring)
                if reason := unusable(summary, rest):
                    counts[f"dropped_{reason}"] += 1
                else:
                    yield Entry(name, unit, signature(child, in_class=in_class), summary, rest)
            if isinstance(child, ast.ClassDef):
                yield from entries_of(child, name, unit, counts, in_class=True)


def halves(docstring: str) -> tuple[str, str]:
    """Return the first paragraph and the rest, each with its whitespace folded.

    >>> halves("Add two\\nnumbers.\\n\\nBoth are  finite.\\n\\n>>> add(1, 2)")
    ('Add two numbers.', 'Both are finite. >>> add(1, 2)')
    """
    summary, *rest = _PARAGRAPH.split(docstring.strip(), maxsplit=1)
    return " ".join(summary.split()), " ".join(" ".join(rest).split())


def unusable(summary: str, rest: str) -> str | None:
    """Return why a docstring makes no query with a passage, or None."""
    shortest, longest = SUMMARY_CHARACTERS
    if not shortest <= len(summary) <= longest:
        return "summary_length"
    if _NOT_PROSE.search(summary):
        return "summary_not_prose"
    if len(rest) < MIN_REST_CHARACTERS or not _WORD.search(rest):
        return "rest_short"
    if _NOT_TEXT.search(summary) or _NOT_TEXT.search(rest):
        return "not_text"
    if f" {normalised(summary)} " in f" {normalised(rest)} ":
        return "summary_in_rest"  # the passage would answer by repeating the question
    return None


def normalised(text: str) -> str:
    """Return the lower-case words of a text, one space between.

    >>> normalised("Return `self.X`!")
    'return self x'
    """
    return " ".join(_WORD.findall(text.lower()))


def signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, *, in_class: bool) -> str:
    """Return names and defaults of a call, without ``self`` and annotations: ``argsort(axis=-1, kind=None)``."""
    if isinstance(node, ast.ClassDef):
        makers = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
        maker = makers.get("__init__") or makers.get("__new__")
        return f"class {node.name}{call(maker, has_self=True) if maker else fields_of(node)}"
    decorators = {ast.unparse(each).rpartition(".")[2] for each in node.decorator_list}
    if in_class and decorators & {"property", "cached_property"}:
        return node.name
    return node.name + call(node, has_self=in_class and "staticmethod" not in decorators)


def call(node: ast.FunctionDef | ast.AsyncFunctionDef, *, has_self: bool) -> str:
    """Return the parameters in parentheses."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args][has_self:]
    arguments.posonlyargs, arguments.args = [], positional
    arguments.defaults = arguments.defaults[max(0, len(arguments.defaults) - len(positional)) :]
    for each in (*positional, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if each is not None:
            each.annotation = None
    return f"({ast.unparse(arguments)})"


def fields_of(node: ast.ClassDef) -> str:
    """Return the annotated fields of a dataclass-like body as parameters, or nothing."""
    names = [each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)]
    return f"({', '.join(name for name in names if not name.startswith('_'))})" if names else ""


# --- what is kept ----------------------------------------------------------------------------------------------------------


def drop_ambiguous(entries: Sequence[Entry], counts: Counter[str]) -> list[Entry]:
    """Keep the first of all entries that share a summary, share a text, or have nearly the same one; count the others."""
    entry_by_text: dict[str, Entry] = {}
    summaries: set[str] = set()
    for entry in entries:
        summary, text = normalised(entry.summary), normalised(entry.rest)
        if summary in summaries:
            counts["dropped_summary_again"] += 1
        elif text in entry_by_text:
            counts["dropped_text_again"] += 1
        else:
            summaries.add(summary)
            entry_by_text[text] = entry
    near = near_duplicates(list(entry_by_text))
    counts["dropped_near_duplicate"] = len(near)
    return [entry for position, entry in enumerate(entry_by_text.values()) if position not in near]


def split_of(unit: str) -> str:
    """Return the split of a module, from its name alone: adding a distribution moves no other module."""
    draw = int.from_bytes(hashlib.sha256(f"pydocs {SPLIT_SALT} {unit}".encode()).digest()[:8], "big") % 100
    return "test" if draw < TEST_PERCENT else "dev" if draw < TEST_PERCENT + DEV_PERCENT else "train"


def write_beir(folder: Path, entries: Sequence[Entry], counts: Counter[str]) -> None:
    """Write corpus, queries and qrels, in name order."""
    qrels = {split: ["query-id\tcorpus-id\tscore\n"] for split in ("train", "dev", "test")}
    passages, queries = [], []
    for entry in entries:
        query_id = f"q:{entry.name}"
        passages.append({"_id": entry.name, "title": entry.name, "text": f"{entry.signature} {entry.rest}"})
        queries.append({"_id": query_id, "text": entry.summary})
        qrels[split_of(entry.unit)].append(f"{query_id}\t{entry.name}\t1\n")
    for name, rows in (("corpus.jsonl", passages), ("queries.jsonl", queries)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text("".join(lines), encoding="utf-8", newline="\n")
    (folder / "qrels").mkdir()
    for split, rows_of_split in qrels.items():
        (folder / "qrels" / f"{split}.tsv").write_text("".join(rows_of_split), encoding="utf-8", newline="\n")
        counts[f"kept_{split}"] = len(rows_of_split) - 1
    counts["kept"] = len(entries)


if __name__ == "__main__":
    sys.exit(main())
