"""Every repository path, make target and flag that the documents name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    path
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "data" / "README.md",
    )
    if path.is_file()
]
# Folders that this repository has or makes; what stages make under the last two is not there in a fresh clone.
TOP_LEVEL = ("pipeline", "src", "tests", "benchmarks", "docs", "data", ".ci")
MADE_LATER = ("data/cache", "data/collections", ".venv")
ENDINGS = (".py", ".toml", ".md", ".txt", ".jsonl", ".tsv", ".yaml")
# Flags of other people's programs that our documents may show.
FOREIGN_FLAGS = {"--constraint", "--editable", "--help", "--version"}
STAGE_SCRIPTS = sorted((ROOT / "pipeline").glob("*.py"))

SPAN = re.compile(r"`([^`\n]+)`")
BLOCK = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
MAKE = re.compile(r"\bmake ((?:[a-z][a-z-]*\b(?!=)[ ]?)+)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


def code_of(text: str) -> list[str]:
    """Return what stands in code spans and code blocks."""
    return [*SPAN.findall(BLOCK.sub("", text)), *BLOCK.findall(text)]


def paths_of(text: str) -> set[str]:
    """Return the words in code that read as paths of this repository; patterns and made-up names are left out."""
    words = {word.strip("`'\",;:()|").rstrip("/") for code in code_of(text) for word in code.split()}
    rooted = {word for word in words if word.startswith(tuple(f"{top}/" for top in TOP_LEVEL))}
    beside = {word for word in words if "/" not in word and word.endswith(ENDINGS) and word[:1].isupper()}
    named = {word for word in words if word in ("Makefile", "LICENSE", "pyproject.toml", "constraints.txt")}
    return {word.partition("::")[0] for word in rooted | beside | named if not re.search(r"[<>*{}…=]|\.\.\.|NAME", word)}


def targets_of(text: str) -> set[str]:
    """Return the targets of every ``make …`` in code; in prose "make" is a verb."""
    return {target for code in code_of(text) for match in MAKE.findall(code) for target in match.split()}


def flags_of(text: str) -> set[str]:
    return {flag for code in code_of(text) for flag in FLAG.findall(code)} - FOREIGN_FLAGS


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))


@pytest.fixture(params=DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def document(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_every_path_named_exists(document: Path) -> None:
    named = paths_of(document.read_text(encoding="utf-8"))

    assert sorted(p for p in named if not p.startswith(MADE_LATER) and not (ROOT / p).exists()) == []


def test_every_relative_link_leads_somewhere(document: Path) -> None:
    links = {link for link in LINK.findall(document.read_text(encoding="utf-8")) if "://" not in link and "@" not in link}

    assert sorted(link for link in links if not (document.parent / link).exists()) == []


def test_every_make_target_named_exists(document: Path) -> None:
    named = targets_of(document.read_text(encoding="utf-8"))

    assert sorted(named - make_targets()) == []


def test_every_flag_named_exists(document: Path) -> None:
    sources = [
        *STAGE_SCRIPTS,
        *(ROOT / "src").rglob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
        *(ROOT / "data").glob("*.py"),
    ]
    known = {flag for path in sources for flag in FLAG.findall(path.read_text(encoding="utf-8"))}

    assert sorted(flags_of(document.read_text(encoding="utf-8")) - known) == []


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    helped = set(re.findall(r"^([a-z][a-z-]*):[^#\n]*## \S", makefile, re.MULTILINE))

    assert make_targets() == helped


def test_every_stage_script_named_by_the_makefile_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:pipeline|benchmarks|data)/[a-z_/]+\.(?:py|toml)", makefile))

    assert sorted(path for path in named if not (ROOT / path).is_file()) == []


def test_the_readers_see_what_they_should() -> None:
    text = "Run `make data teacher-scores RECIPE=x.toml --dry-run`, see `src/gone.py` and [that](gone.md); make haste."

    assert targets_of(text) == {"data", "teacher-scores"}
    assert paths_of(text) == {"src/gone.py"}
    assert flags_of(text) == {"--dry-run"}
    assert LINK.findall(text) == ["gone.md"]
