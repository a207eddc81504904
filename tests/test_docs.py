"""Every repository path, link, make target, command, flag and recipe key that the documents name exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer.main
from pydantic import BaseModel

from sparsekd.cli import app
from sparsekd.collection import read_collection
from sparsekd.recipe import Recipe, load_recipe
from sparsekd.stage import _parser

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    path
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "data" / "README.md",
        ROOT / "benchmarks" / "README.md",
    )
    if path.is_file()
]
# Folders that this repository has or makes; what stages make under the last two is not there in a fresh clone.
TOP_LEVEL = ("pipeline", "src", "tests", "benchmarks", "docs", "data", ".ci")
MADE_LATER = ("data/cache", "data/collections", ".venv")
ENDINGS = (".py", ".toml", ".md", ".txt", ".jsonl", ".tsv", ".yaml")
# Flags of other people's programs that our documents may show.
FOREIGN_FLAGS = {"--constraint", "--editable", "--help", "--version", "--nproc-per-node", "--strict", "--max-restarts", "--head"}
FOREIGN_FLAGS |= {"--address", "--generate"}

# Pages whose blocks of TOML are parts of recipes, and what is put around a part.
GUIDES = ("your-collection.md", "your-teacher.md", "choosing.md")
REST = {
    "collection": '[collection]\npath = "c"\n',
    "mining": '[[mining.miners]]\nkind = "bm25"\nquota = 8\n',
    "teachers": '[[teachers]]\nname = "minilm"\nkind = "dense"\nmodel = "m"\n[[teachers]]\nname = "lexical"\nkind = "bm25"\n',
    "student": '[student]\nmodel = "m"\n',
}

SPAN = re.compile(r"`([^`\n]+)`")
FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)((?:    [^\n]*\n|\n(?=    ))+)")
QUOTE = re.compile(r"(?:^> [^\n]*\n?)+", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
MAKE = re.compile(r"\bmake ((?:[a-z][a-z-]*\b(?!=)[ ]?)+)")
VARIABLE = re.compile(r"\b([A-Z]+)=")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
SCRIPT = re.compile(r"(?:^|\s)((?:pipeline|benchmarks|data)/\w+\.py)\b")
TABLE = re.compile(r"\[{1,2}([a-z_]+(?:\.\w+)*)\]{1,2}(?: ([a-z_]+))?")
SECTIONS = "|".join(Recipe.model_fields)
OVERRIDE = re.compile(rf"""(?<![\w./-])((?:{SECTIONS})(?:\.(?:\w+|"[^"]+"))+)=""")
SETTING = re.compile(r"([a-z_]+) = \S.*")


def blocks_of(text: str) -> list[str]:
    """Return the code blocks, fenced or indented by four, without their indentation."""
    fenced = FENCED.findall(text)
    indented = INDENTED.findall(FENCED.sub("", text))
    return [*fenced, *(re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in indented)]


def spans_of(text: str) -> list[str]:
    return SPAN.findall(INDENTED.sub("", FENCED.sub("", text)))


def code_of(text: str) -> list[str]:
    """Return what stands in code spans, and each line of the code blocks."""
    return [*spans_of(text), *(line for block in blocks_of(text) for line in block.splitlines())]


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


def variables_of(text: str) -> set[str]:
    """Return what is set after ``make``, values left out."""
    calls = [re.sub(r"""(["']).*?\1""", "", code) for code in code_of(text) if MAKE.search(code)]
    return {name for call in calls for name in VARIABLE.findall(call)}


def command_lines_of(text: str) -> Iterator[list[str]]:
    """Yield the words after ``sparsekd`` of every line or span that calls it; one of ``bank …`` alone is such a call too."""
    for code in code_of(text):
        words = code.replace("[", " ").replace("]", " ").split()
        if words and words[0].removeprefix(".venv/bin/") == "sparsekd":
            yield words[1:]
        elif len(words) > 1 and words[0] == "bank":
            yield words


def unknown_words(words: Sequence[str]) -> list[str]:
    """Return the commands and flags among the words of a call of ``sparsekd`` that its parser does not have."""
    command, rest = typer.main.get_command(app), list(words)
    while rest and hasattr(command, "commands") and re.fullmatch(r"[a-z-]+", rest[0]):
        if rest[0] not in command.commands:
            return [rest[0]]
        command = command.commands[rest.pop(0)]
    known = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]} | FOREIGN_FLAGS
    return [flag for word in rest for flag in FLAG.findall(word) if flag not in known]


def sparsekd_flags(command: Any = None) -> set[str]:
    command = command or typer.main.get_command(app)
    found = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
    return found.union(*(sparsekd_flags(each) for each in getattr(command, "commands", {}).values()))


def script_flags(path: str) -> set[str]:
    """Return the flags of a script: those of the stage parser, or what a benchmark or a builder adds to its own."""
    if path.startswith("pipeline/"):
        return {option for action in _parser("")._actions for option in action.option_strings}
    return set(re.findall(r"""add_argument\(\s*["'](--[a-z-]+)["']""", (ROOT / path).read_text(encoding="utf-8")))


def scripts() -> list[str]:
    found = [path for room in ("pipeline", "benchmarks", "data") for path in (ROOT / room).glob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def keys_of(text: str) -> set[tuple[str, ...]]:
    """Return the recipe's keys that code names: ``[table] key``, ``section.key=``, and every key of a block of TOML."""
    found: set[tuple[str, ...]] = set()
    for code in [*spans_of(text), *(line for block in blocks_of(text) if not is_toml(block) for line in block.splitlines())]:
        found |= {tuple(re.findall(r'"[^"]+"|\w+', dotted)) for dotted in OVERRIDE.findall(code)}
    for code in spans_of(text):
        found |= {(*table.split("."), *filter(None, [key])) for table, key in TABLE.findall(code)}
    for block in filter(is_toml, blocks_of(text)):
        found |= set(paths_in(tomllib.loads(block), ()))
    return found


def settings_of(text: str) -> set[str]:
    """Return the keys of spans ``key = value``, whose section the sentence says."""
    return {match[1] for span in spans_of(text) if (match := SETTING.fullmatch(span))}


def is_toml(block: str) -> bool:
    return re.match(r"\s*\[{1,2}[a-z_.]+\]{1,2}", block) is not None


def paths_in(value: Any, prefix: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield (*prefix, name)
            yield from paths_in(each, (*prefix, name))
    elif isinstance(value, list):
        for each in value:
            yield from paths_in(each, prefix)


def shape_of(annotation: Any) -> tuple[set[type[BaseModel]], bool, bool]:
    """Return the models an annotation can hold, whether in a list, whether by name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}, False, False
    origin, models, in_list, by_name = typing.get_origin(annotation), set[type[BaseModel]](), False, False
    if origin in (typing.Union, types.UnionType, typing.Annotated, tuple, dict):
        for part in typing.get_args(annotation):
            inner, inner_list, inner_name = shape_of(part)
            models, in_list, by_name = models | inner, in_list or inner_list, by_name or inner_name
    return models, in_list or origin is tuple, by_name or origin is dict


def is_recipe_key(keys: Sequence[str], models: Iterable[type[BaseModel]] = (Recipe,)) -> bool:
    """Say whether the schema has a key; an item of a list may be named, as after ``--set``, or not, as in a table's header."""
    if not keys:
        return True
    for model in models:
        if keys[0] not in model.model_fields:
            continue
        inner, in_list, by_name = shape_of(model.model_fields[keys[0]].annotation)
        rest = keys[1:]
        if (not by_name and is_recipe_key(rest, inner)) or ((in_list or by_name) and is_recipe_key(rest[1:], inner)):
            return True
    return False


def all_settings(model: type[BaseModel] = Recipe) -> set[str]:
    inner = [each for field in model.model_fields.values() for each in shape_of(field.annotation)[0]]
    return set(model.model_fields).union(*(all_settings(each) for each in inner))


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


def test_every_variable_given_to_make_is_one_of_the_makefile(document: Path) -> None:
    named = variables_of(document.read_text(encoding="utf-8"))

    known = re.findall(r"^([A-Z]+)\s*[?:]?=", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named - set(known)) == []


def test_every_flag_named_is_one_of_a_real_parser(document: Path) -> None:
    known = sparsekd_flags().union(*map(script_flags, scripts()))

    assert sorted(flags_of(document.read_text(encoding="utf-8")) - known) == []


def test_every_call_of_a_script_has_flags_of_its_own_parser(document: Path) -> None:
    wrong = [
        (script, flag)
        for code in code_of(document.read_text(encoding="utf-8"))
        for match in SCRIPT.finditer(code)
        for script in [match[1]]
        for flag in FLAG.findall(code[match.end() :])
        if flag not in script_flags(script)
    ]

    assert wrong == []


def test_every_call_of_sparsekd_has_commands_and_flags_of_its_parser(document: Path) -> None:
    wrong = {" ".join(words): unknown_words(words) for words in command_lines_of(document.read_text(encoding="utf-8"))}

    assert {call: unknown for call, unknown in wrong.items() if unknown} == {}


def test_every_recipe_key_named_is_one_of_the_schema(document: Path) -> None:
    text = document.read_text(encoding="utf-8")

    assert sorted(".".join(keys) for keys in keys_of(text) if not is_recipe_key(keys)) == []
    assert sorted(settings_of(text) - all_settings()) == []


def test_every_command_is_in_the_documents() -> None:
    """A command that no document calls is one that nobody finds."""
    called = [words for path in DOCUMENTS for words in command_lines_of(path.read_text(encoding="utf-8"))]
    known = [
        (name, *([] if under is None else [under]))
        for name, command in typer.main.get_command(app).commands.items()
        for under in getattr(command, "commands", {None: None})
    ]

    assert [command for command in known if not any(tuple(words[: len(command)]) == command for words in called)] == []


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
    assert variables_of(text) == {"RECIPE"}
    assert paths_of(text) == {"src/gone.py"}
    assert flags_of(text) == {"--dry-run"}
    assert LINK.findall(text) == ["gone.md"]


def test_the_readers_see_indented_blocks() -> None:
    text = "Here:\n\n    make data SET=\"A=b labels.kind=none\"\n\n    sparsekd bank ls --cache X\n\nand `[run] gone`, not there.\n"

    assert targets_of(text) == {"data"}
    assert variables_of(text) == {"SET"}
    assert list(command_lines_of(text)) == [["bank", "ls", "--cache", "X"]]
    assert keys_of(text) == {("labels", "kind"), ("run", "gone")}


@pytest.mark.parametrize(
    ("words", "unknown"),
    [
        ("bank ls --cache X", []),
        ("bank sl", ["sl"]),
        ("export table LAYOUT T OUT --overwrite --colection X", ["--colection"]),
        ("import …", []),
    ],
)
def test_a_call_is_held_against_the_parser(words: str, unknown: list[str]) -> None:
    assert unknown_words(words.split()) == unknown


@pytest.mark.parametrize(
    ("dotted", "is_known"),
    [
        ("labels.num_negatives", True),
        ("labels.num_negatifs", False),
        ("labels.calibrations.NAME.kind", True),
        ("labels.calibrations.NAME.kidn", False),
        ("labels.weights.minilm", True),
        ("teachers.minilm.max_length", True),
        ("mining.miners.kind", True),
        ("mining.miners.0.skip", True),
        ("mining.fallback.quota", True),
        ("student.budget.query_active_dims", True),
        ("student.budgets", False),
    ],
)
def test_a_key_is_held_against_the_schema(dotted: str, is_known: bool) -> None:
    assert is_recipe_key(dotted.split(".")) is is_known


def test_a_block_of_toml_is_read_whole() -> None:
    text = "So:\n\n    [[teachers]]\n    name = \"a\"\n    fields = {b = \"1\"}\n\n    [labels]\n    kidn = 1\n\nend\n"

    assert keys_of(text) == {("teachers",), ("teachers", "name"), ("teachers", "fields"), ("teachers", "fields", "b"), ("labels",),
                             ("labels", "kidn")}  # fmt: skip


def quotes_of(text: str) -> list[str]:
    """Return the block quotes: what the program says, with … for what differs."""
    return [re.sub(r"^> ?", "", block, flags=re.MULTILINE).replace("\n", " ").strip() for block in QUOTE.findall(text)]


def said_in(source: str) -> Iterator[str]:
    """Yield the text constants of a module; of an f-string with … in place of its values."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%(\.\d+)?[sdfg]", "…", node.value)


def is_said(quote: str, said: Iterable[str]) -> bool:
    """Whether one message has the words of the quote in their order; values and what a message chooses from stand as …."""
    parts = [re.escape(part) for part in (piece.strip(" ") for piece in quote.split("…")) if part.strip(" ;:,.()'")]
    return bool(parts) and any(re.search(r".*".join(parts), each) for each in said)


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What the program can say."""
    return [each for path in (ROOT / "src").rglob("*.py") for each in said_in(path.read_text(encoding="utf-8"))]


def test_every_quoted_message_is_one_that_the_program_says(document: Path, said: list[str]) -> None:
    assert [quote for quote in quotes_of(document.read_text(encoding="utf-8")) if not is_said(quote, said)] == []


@pytest.mark.parametrize(
    ("quote", "expected"),
    [("…: no such …; try …", True), ("…: no such file, friend", False), ("try …: no such", False), ("…", False)],
)
def test_a_quote_is_held_against_whole_messages(quote: str, expected: bool) -> None:
    source = 'raise ValueError(f"{path}: no such file; "\n                 f"try {other}")'

    assert is_said(quote, said_in(source)) is expected


@pytest.mark.parametrize("name", GUIDES)
def test_every_part_of_a_recipe_in_a_guide_makes_a_recipe(name: str, tmp_path: Path) -> None:
    """What a block leaves out of a recipe is filled in, with two teachers where it names none."""
    for place, block in enumerate(filter(is_toml, blocks_of((ROOT / "docs" / name).read_text(encoding="utf-8")))):
        part = tomllib.loads(block)
        path = tmp_path / f"{place}.toml"
        path.write_text(block + "".join(text for table, text in REST.items() if table not in part), encoding="utf-8")

        load_recipe(path)


@pytest.mark.parametrize(("heading", "recipe"), [("The quickstart", "quickstart"), ("The ensemble, and its study", "ensemble")])
def test_every_line_of_a_recipe_is_explained(heading: str, recipe: str) -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = (ROOT / "pipeline" / "recipes" / f"{recipe}.toml").read_text(encoding="utf-8").splitlines()
    settings = {re.sub(r"(^#| #).*", "", line).strip() for line in lines if not line.startswith(" ")} - {"", "]"}

    assert sorted(settings - set(spans_of(section))) == []


def test_every_recipe_is_in_the_table_of_recipes() -> None:
    named = paths_of((ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"))

    assert sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "pipeline" / "recipes").glob("*.toml")) == sorted(
        path for path in named if path.startswith("pipeline/recipes/")
    )


def test_the_script_of_the_guide_makes_a_collection(tmp_path: Path) -> None:
    [script] = FENCED.findall((ROOT / "docs" / "your-collection.md").read_text(encoding="utf-8"))
    (tmp_path / "make_collection.py").write_text(script, encoding="utf-8")

    subprocess.run([sys.executable, tmp_path / "make_collection.py", ROOT / "src", tmp_path / "names"], check=True)

    collection = read_collection(tmp_path / "names")
    assert set(collection.qrels) == {"train", "dev", "test"}
    assert all(collection.qrels.values())


def test_the_readme_leads_to_every_page() -> None:
    links = set(LINK.findall((ROOT / "README.md").read_text(encoding="utf-8")))

    assert sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if f"docs/{path.name}" not in links) == []
