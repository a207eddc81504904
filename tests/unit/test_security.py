"""What SECURITY.md promises of the source itself, and that every test it names is there. Imports no torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from sparsekd.recipe import BM25Teacher, CausalLMTeacher, DenseMiner, Teacher

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for folder in ("src", "pipeline", "data") for path in sorted((ROOT / folder).rglob("*.py"))]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")

# Modules and functions that run, build or unpack what a file says; ast.literal_eval reads literals and is none of them.
DANGEROUS_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "tarfile", "zipfile"}
DANGEROUS_CALLS = {"eval", "exec", "torch.load", "np.load", "numpy.load", "pandas.read_pickle", "shutil.unpack_archive"}
UNPICKLES = {"src/sparsekd/exchange/score_dict.py", "src/sparsekd/exchange/opcodes.py"}
# Loaders that would ask on the terminal, or fall back to code in the folder, where nothing is said.
LOADERS = {"AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained"}


def nodes() -> Iterator[tuple[str, ast.AST]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            yield path.relative_to(ROOT).as_posix(), node


def test_nothing_unpickles_evaluates_or_unpacks_but_the_checked_reader() -> None:
    found = set()
    for path, node in nodes():
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if {name.partition(".")[0] for name in names} & DANGEROUS_MODULES:
                found.add(path)
        is_call = isinstance(node, ast.Call) and ast.unparse(node.func) in DANGEROUS_CALLS
        if is_call and "allow_pickle=False" not in ast.unparse(node):
            found.add(f"{path}:{getattr(node, 'lineno', 0)}")

    assert found == UNPICKLES


def test_trust_in_code_is_off_unless_said() -> None:
    for section in (Teacher, CausalLMTeacher, DenseMiner):
        assert section.model_fields["trust_remote_code"].default is False
    assert "trust_remote_code" not in BM25Teacher.model_fields


def test_every_loader_says_whether_it_trusts_code() -> None:
    calls = [(path, node) for path, node in nodes() if isinstance(node, ast.Call) and ast.unparse(node.func) in LOADERS]

    silent = [
        f"{path}:{node.lineno}"
        for path, node in calls
        # None is a mapping that is spread; those of teachers come from the spec.
        if not {"trust_remote_code", None} & {keyword.arg for keyword in node.keywords}
    ]

    assert len(calls) >= 4
    assert silent == []


def test_every_test_that_security_names_is_there() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| promise ")]

    named = NAMED.findall(text)

    assert all(NAMED.search(row) for row in rows)
    assert len(rows) >= 10
    functions = {path: (ROOT / path).read_text(encoding="utf-8") for path, _ in named}
    assert [f"{path}::{name}" for path, name in named if f"def {name}(" not in functions[path]] == []
