"""Laws of the built-in collection's builder: what becomes a pair, what is dropped, and the same bytes every time."""

from __future__ import annotations

import doctest
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sparsekd.collection import read_collection

DATA = Path(__file__).resolve().parents[2] / "data"
BODY = "The rest of the documentation says what happens when the input is empty or too long."


@pytest.fixture(scope="module")
def builder() -> Any:
    """The script as a module."""
    sys.path.insert(0, str(DATA))
    try:
        import build_pydocs

        return build_pydocs
    finally:
        sys.path.remove(str(DATA))


def parsed(builder: Any, folder: Path, code: str) -> tuple[list[Any], Counter[str]]:
    path = folder / "module.py"
    path.write_text(code, encoding="utf-8")
    result: tuple[list[Any], Counter[str]] = builder.parse(builder.Source(str(path), "shop._till", "shop"))
    return result


def install(site: Path, name: str, modules: dict[str, str]) -> None:
    """A distribution as pip leaves it."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    for path, code in modules.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(code, encoding="utf-8")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in [*modules, f"{info.name}/METADATA", f"{info.name}/RECORD"]))


def function(name: str, summary: str, rest: str) -> str:
    return f'def {name}(a, b=1):\n    """{summary}\n\n    {rest}\n    """\n\n'


def build(out: Path, site: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a folder of its own, so that only ``--out`` says where to write."""
    constraints = site / "constraints.txt"
    constraints.write_text("# pins\nshop==1.0\nnot-there==2.0  # pinned for others\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(DATA.parent / "src")])}
    command = [sys.executable, str(DATA / "build_pydocs.py"), "--out", str(out), "--constraints", str(constraints), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=site, check=False)


SHOP = {
    "shop/__init__.py": function("count_apples", "Count the apples in a basket.", BODY),
    "shop/_till.py": function(
        "add_prices", "Add the prices of all goods.", "Prices are in cents and have to be whole. " + BODY[::-1]
    ),
    "shop/_vendor/copy.py": function(
        "hidden", "Something nobody should see.", "Vendored code is documented elsewhere and stays out."
    ),
    "shop/tests/test_shop.py": function(
        "check", "Something only tests should see.", "Test code is no documentation and it stays out too."
    ),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A collection of the standard library and one small distribution, and the folder that is installed in."""
    site = tmp_path_factory.mktemp("site")
    install(site, "shop", SHOP)
    out = tmp_path_factory.mktemp("out") / "pydocs"
    done = build(out, site)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out)
    return out, site


def test_summary_becomes_query_and_signature_with_rest_becomes_passage(builder: Any, tmp_path: Path) -> None:
    code = (
        f'def pay(amount: int, *, tip: float = 0.1) -> int:\n    """Pay an amount\n    at the  till.\n\n    {BODY}\n    """\n'
    )

    entries, counts = parsed(builder, tmp_path, code)

    assert entries == [builder.Entry("shop.pay", "shop", "pay(amount, *, tip=0.1)", "Pay an amount at the till.", BODY)]
    assert counts == {"docstrings": 1}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (
            "class Box(list):\n    {doc}\n    def __init__(self, size, /, *items, lid=None): ...",
            "class Box(size, *items, lid=None)",
        ),
        ("class Box:\n    {doc}\n    def __new__(cls, size=3): ...", "class Box(size=3)"),
        ("class Box:\n    {doc}\n    width: int\n    depth: int = 2\n    _hidden: int = 0", "class Box(width, depth)"),
        ("class Box:\n    {doc}", "class Box"),
        ("class Box:\n    def open(self, force=False):\n        {doc}", "open(force=False)"),
        ("class Box:\n    @staticmethod\n    def open(path=None):\n        {doc}", "open(path=None)"),
        ("class Box:\n    @property\n    def size(self):\n        {doc}", "size"),
        ("class Box:\n    def open(self=None):\n        {doc}", "open()"),
        ("async def fetch(url, **more):\n    {doc}", "fetch(url, **more)"),
    ],
)
def test_signatures_show_what_a_caller_writes(builder: Any, tmp_path: Path, code: str, expected: str) -> None:
    entries, _ = parsed(builder, tmp_path, code.format(doc=f'"""Say what this is for.\n\n{BODY}"""'))

    assert [entry.signature for entry in entries] == [expected]


@pytest.mark.parametrize(
    ("docstring", "reason"),
    [
        (f"Too short.\n\n{BODY}", "summary_length"),
        (f"{'Very long ' * 40}\n\n{BODY}", "summary_length"),
        ("Only a summary and nothing else.", "rest_short"),
        ("A summary and a little.\n\nLittle.", "rest_short"),
        (f"pay(amount, tip=0.1) -> int\n\n{BODY}", "summary_not_prose"),
        (f"Pay an amount.\n:param amount: in cents\n\n{BODY}", "summary_not_prose"),
        (f"Pay an amount now.\n\nTo say it again: pay an amount, now! {BODY}", "summary_in_rest"),
        (f"Pay an amount now.\n\n{BODY}\\x00", "not_text"),
        (f"Pay an amount \\ud800 now.\n\n{BODY}", "not_text"),
    ],
)
def test_docstrings_without_a_usable_pair_are_counted(builder: Any, tmp_path: Path, docstring: str, reason: str) -> None:
    entries, counts = parsed(builder, tmp_path, f'def pay():\n    """{docstring}"""\n')

    assert entries == []
    assert counts == {"docstrings": 1, f"dropped_{reason}": 1}


def test_examples_in_its_docstrings_hold(builder: Any) -> None:
    results = doctest.testmod(builder)

    assert results.attempted == 3
    assert results.failed == 0


def test_private_and_nested_names_stay_out_and_conditional_ones_are_read(builder: Any, tmp_path: Path) -> None:
    doc = f'"""Say what this is for.\n\n{BODY}"""'
    code = (
        f"def _private():\n    {doc}\n"
        f"class _Private:\n    def public(self):\n        {doc}\n"
        f"def outer():\n    def inner():\n        {doc}\n"
        f"try:\n    def tried():\n        {doc}\nexcept ImportError:\n    def caught():\n        {doc}\n"
        f"if x:\n    def then():\n        {doc}\nelse:\n    def otherwise():\n        {doc}\n"
    )

    entries, _ = parsed(builder, tmp_path, code)

    assert {entry.name for entry in entries} == {f"shop.{name}" for name in ("tried", "caught", "then", "otherwise")}


def test_a_file_that_is_no_python_is_counted(builder: Any, tmp_path: Path) -> None:
    assert parsed(builder, tmp_path, 'print "old"') == ([], {"files_unparsable": 1})


def test_shared_summaries_and_texts_are_dropped_and_counted(builder: Any) -> None:
    words = [f"word{number}" for number in range(40)]
    texts = [" ".join(words), " ".join(reversed(words)), " ".join(words).upper(), " ".join([*words[:39], "other"])]
    summaries = ["Count it.", "count IT", "Something else.", "Another thing."]
    entries = [builder.Entry(f"n{i}", "u", "", summaries[i], texts[i]) for i in range(4)]
    counts: Counter[str] = Counter()

    kept = builder.drop_ambiguous(entries, counts)

    assert [entry.name for entry in kept] == ["n0"]
    assert counts == {"dropped_summary_again": 1, "dropped_text_again": 1, "dropped_near_duplicate": 1}


def test_near_duplicates_are_those_that_comparing_all_pairs_finds(builder: Any) -> None:
    draw = random.Random(0)
    vocabulary = [f"w{number}" for number in range(30)]
    originals = [[draw.choice(vocabulary) for _ in range(draw.randint(1, 30))] for _ in range(60)]
    edited = [[word if draw.random() > 0.08 else "x" for word in draw.choice(originals)] for _ in range(140)]
    texts = [" ".join(words) for words in originals + edited]

    def shingles(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

    sets = [shingles(text) for text in texts]
    kept: list[int] = []
    for position, own in enumerate(sets):
        if all(len(own & sets[other]) / len(own | sets[other]) < 0.6 for other in kept):
            kept.append(position)

    found = builder.near_duplicates(texts)

    assert found == set(range(len(texts))) - set(kept)
    assert 10 < len(found) < 190


def test_built_collection_is_sound_and_each_query_has_its_own_passage(built: tuple[Path, Path]) -> None:
    out, _ = built

    collection = read_collection(out)

    manifest = json.loads((out / "manifest.json").read_text())
    pairs = [(query, passages) for rows in collection.qrels.values() for query, passages in rows.items()]
    assert all(passages == {query.removeprefix("q:"): 1} for query, passages in pairs)
    assert len(pairs) == len(collection.passages) == len(collection.queries) == manifest["counts"]["kept"] > 1000
    assert {split: len(rows) for split, rows in collection.qrels.items()} == {
        split: manifest["counts"][f"kept_{split}"] for split in ("train", "dev", "test")
    }
    assert len(set(collection.queries.values())) == len(collection.queries)
    assert collection.passages["shop.count_apples"] == f"shop.count_apples count_apples(a, b=1) {BODY}"
    assert {name for name in collection.passages if name.startswith("shop")} == {"shop.count_apples", "shop.add_prices"}


def test_no_module_is_in_two_splits(built: tuple[Path, Path]) -> None:
    collection = read_collection(built[0])

    modules = {
        split: {query.split(":")[1].split(".")[0] for query in rows} - {"shop"} for split, rows in collection.qrels.items()
    }

    assert not modules["train"] & modules["test"]
    assert not modules["train"] & modules["dev"]
    assert not modules["dev"] & modules["test"]


def test_manifest_accounts_for_every_docstring_and_every_byte(built: tuple[Path, Path]) -> None:
    out, _ = built
    manifest = json.loads((out / "manifest.json").read_text())
    counts = manifest["counts"]

    dropped = sum(count for name, count in counts.items() if name.startswith("dropped_"))

    assert counts["docstrings"] == counts["kept"] + dropped
    assert manifest["fields"]["distributions"] == {"shop": "1.0"}
    assert manifest["fields"]["python"].endswith(".".join(map(str, sys.version_info[:3])))
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert sorted(manifest["sha256"]) == ["corpus.jsonl", "qrels/dev.tsv", "qrels/test.tsv", "qrels/train.tsv", "queries.jsonl"]


def test_second_call_is_a_hit_that_writes_nothing(built: tuple[Path, Path]) -> None:
    out, site = built
    before = (out / "manifest.json").stat().st_mtime_ns

    done = build(out, site)

    assert done.returncode == 0
    assert ": hit, 0." in done.stderr
    assert done.stdout == f"{out}\n"
    assert (out / "manifest.json").stat().st_mtime_ns == before


def test_another_place_and_one_process_give_the_same_bytes(built: tuple[Path, Path], tmp_path: Path) -> None:
    out, _ = built
    site = tmp_path / "elsewhere"
    install(site, "shop", SHOP)

    done = build(tmp_path / "again", site, "--processes", "1")

    assert done.returncode == 0, done.stderr
    for path in (path for path in sorted(out.rglob("*")) if path.is_file()):
        assert (tmp_path / "again" / path.relative_to(out)).read_bytes() == path.read_bytes(), path


@pytest.mark.slow
def test_a_damaged_collection_and_another_version_are_rebuilt(built: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "pydocs"
    shutil.copytree(built[0], out)
    site = tmp_path / "site"
    install(site, "shop", SHOP)
    whole = (out / "corpus.jsonl").read_bytes()
    (out / "corpus.jsonl").write_bytes(whole[:-10])

    damaged = build(out, site)
    info = site / "shop-1.0.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shop\nVersion: 1.1\n")
    upgraded = build(out, site)

    assert "rebuilding, damaged:" in damaged.stderr
    assert "rebuilding, changed: distributions.shop 1.0 -> 1.1" in upgraded.stderr
    assert (out / "corpus.jsonl").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")

    done = build(tmp_path, tmp_path)

    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1] == f"{tmp_path}: stands and was not made by this builder; give another --out or remove it"
    )
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_missing_and_malformed_constraints_are_refused(
    builder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pins.txt"
    out = str(tmp_path / "out")

    missing = builder.main(["--out", out, "--constraints", str(path)])
    path.write_text("numpy==2.4.6\n-r other.txt\n")
    malformed = builder.main(["--out", out, "--constraints", str(path)])

    assert (missing, malformed) == (2, 2)
    assert capsys.readouterr().err.splitlines() == [
        f"{path}: no such file; expected pins like numpy==2.4.6; give --constraints FILE",
        f"{path}:2: found '-r other.txt', expected a pin like numpy==2.4.6; correct the line",
    ]


def test_an_installation_with_missing_files_is_refused(tmp_path: Path) -> None:
    install(tmp_path, "shop", SHOP)
    (tmp_path / "shop" / "_till.py").unlink()

    done = build(tmp_path / "out", tmp_path)

    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "shop 1.0: shop/_till.py is listed as installed and missing; reinstall it with pip"
    assert not (tmp_path / "out").exists()
