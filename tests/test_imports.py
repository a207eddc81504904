"""The direction of imports between rooms, read from source with ``ast``; and which rooms load without torch."""

from __future__ import annotations

import ast
import graphlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "sparsekd"

# A room may import rooms of an earlier or its own line; within a line, not in a circle.
LINES = (
    (
        *("overrides", "quiet", "interruption", "recipe", "artifact", "model_folder", "model_reference", "provenance", "device"),
        "collection",
    ),
    ("packed_body",),
    ("bank",),
    ("runners",),
    ("mining", "teachers"),
    ("labels",),
    ("students", "training"),
    ("teacher_training",),
    ("plan",),
    ("resources",),
    ("doctor", "gate", "dry_run", "experiment"),
    ("evaluation",),
    ("study",),
    ("report",),
    ("retrieval",),
    ("exchange",),
    ("engines",),
    ("stage", "cli"),
)
LEVEL = {room: level for level, line in enumerate(LINES) for room in line}
STAGE_1 = {"mining", "teachers"}
STAGE_2 = {"students", "training"}
WITHOUT_TORCH = (
    *LINES[0],
    "bank",
    "runners",
    "labels",
    "plan",
    "resources",
    "doctor",
    "gate",
    "dry_run",
    "experiment",
    "study",
    "report",
    "retrieval",
    "exchange",
    "engines",
    "stage",
    "cli",
)
# Each of these loads torch, or takes seconds to load by itself.
HEAVY = ("torch", "transformers", "sentence_transformers", "accelerate", "safetensors.torch")

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Yield every absolute module that ``tree`` imports, at any depth; ``from a import b`` yields a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; absolute ones only"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def statements_run_at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield import statements outside functions, those under ``if TYPE_CHECKING`` left out."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from statements_run_at_import(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for name in ("body", "orelse", "finalbody", "handlers"):
                yield from statements_run_at_import(getattr(node, name, []))


def imported_rooms() -> set[tuple[str, str]]:
    """Return every (room, other room that it imports)."""
    pairs = set()
    for path in FILES:
        for module in imported_modules(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            package, _, rest = module.partition(".")
            other = rest.partition(".")[0]
            if package == "sparsekd" and (other in LEVEL or (PACKAGE / other).is_dir()):
                pairs.add((room_of(path), other or "__init__"))
    return {(room, other) for room, other in pairs if room != other and other != "__init__"}


def test_every_room_has_its_place_in_the_direction() -> None:
    rooms = {room_of(path) for path in FILES}

    assert rooms - set(LEVEL) == set(), "give the room a line in LINES"


def test_rooms_import_earlier_rooms_only() -> None:
    against = sorted(f"{room} imports {other}" for room, other in imported_rooms() if LEVEL[other] > LEVEL[room])

    assert against == []


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    imported = imported_rooms()
    rooms = {room: {other for importer, other in imported if importer == room} for room in LEVEL}

    in_order = list(graphlib.TopologicalSorter(rooms).static_order())  # CycleError names the circle

    assert set(in_order) == set(LEVEL)


def test_stage_1_and_stage_2_never_import_each_other() -> None:
    forbidden = {*itertools.product(STAGE_1, STAGE_2), *itertools.product(STAGE_2, STAGE_1)}

    assert sorted(imported_rooms() & forbidden) == []


def test_the_library_does_not_import_the_stage_scripts() -> None:
    scripts = {"pipeline", *(path.stem for path in (ROOT / "pipeline").glob("*.py"))}

    for path in FILES:
        modules = imported_modules(ast.parse(path.read_text(encoding="utf-8"), str(path)))
        assert sorted(scripts & {module.partition(".")[0] for module in modules}) == [], path


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) in WITHOUT_TORCH], ids=module_of)
def test_no_heavy_import_at_the_top_of_a_light_module(path: Path) -> None:
    statements = statements_run_at_import(ast.parse(path.read_text(encoding="utf-8")).body)
    modules = {module for statement in statements for module in imported_modules(statement)}

    assert sorted(module for module in modules if module.startswith(HEAVY)) == []


@pytest.mark.parametrize("room", [room for room in WITHOUT_TORCH if room in {room_of(path) for path in FILES}])
def test_importing_a_light_room_loads_no_torch(room: str) -> None:
    modules = [module_of(path) for path in FILES if room_of(path) == room]
    program = f"import sys, {', '.join(modules)}; print(sorted({{*{HEAVY!r}}} & {{*sys.modules}}))"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)

    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_the_package_itself_imports_nothing() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))

    assert list(imported_modules(tree)) == []
