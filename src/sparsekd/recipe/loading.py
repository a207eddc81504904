"""From a TOML file to a Recipe, with errors that name file, section, key, what was found and what was expected."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from sparsekd.collection.reading import shown
from sparsekd.overrides import apply_override
from sparsekd.recipe.mining import (
    BM25Miner,
    DenseMiner,
    Mining,
    NegativeFilter,
    RandomMiner,
    RunMiner,
    SparseMiner,
    StudentMiner,
)
from sparsekd.recipe.plain_values import key_shown, refuse_odd_values
from sparsekd.recipe.sections import Budget, Calibration, Collection, Evaluation, Labels, Recipe, Run, Student, Training
from sparsekd.recipe.study import SECTIONS, Member, Study
from sparsekd.recipe.teacher_training import TrainTeacher
from sparsekd.recipe.teachers import BM25Teacher, CallableTeacher, CausalLMTeacher, FileTeacher, Seq2SeqLMTeacher, Teacher


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and validate a recipe, with ``section.key=value`` overrides applied before validation.

    Raises FileNotFoundError if the file is missing and ValueError, naming file, section, key, what was found and what was
    expected, for anything that is not a recipe.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe; expected a TOML file, e.g. pipeline/recipes/quickstart.toml")
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors put a byte-order mark there
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, a number of 5,000 digits, 1,000 nested brackets
        raise ValueError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        apply_override(document, override)
    return recipe_of(document, str(path))


def study_members(recipe: Recipe) -> list[Member]:
    """Return the members of a recipe's study, each validated.

    Raises ValueError naming the member if an override leads nowhere, names a section that members share, or gives what is no
    recipe; if two members are the same experiment; and if there is none.
    """
    if recipe.study is None or not recipe.study.overrides:
        raise ValueError('[study] has no member; expected grid or members, e.g. members = [[], ["training.max_steps=200"]]')
    members: list[Member] = []
    for number, overrides in enumerate(recipe.study.overrides, start=1):
        place = f"[study] member {number} ({' '.join(overrides) or 'no override'})"
        member = Member(overrides, _member(recipe, overrides, place))
        same = next((at for at, other in enumerate(members, start=1) if other.recipe == member.recipe), None)
        if same is not None:
            raise ValueError(f"{place} is the same experiment as member {same} ({members[same - 1].name}); remove one of the two")
        members.append(member)
    return members


def recipe_document(recipe: Recipe) -> dict[str, Any]:
    """Return what the recipe sets, but for its study, as JSON would hold it: ``recipe_of`` gives the recipe again."""
    return recipe.model_dump(mode="json", exclude_unset=True, exclude={"study"})


def _member(recipe: Recipe, overrides: Sequence[str], place: str) -> Recipe:
    document = recipe_document(recipe)
    for override in overrides:
        section = override.partition("=")[0].strip().partition(".")[0]
        if section not in SECTIONS:
            known = ", ".join(SECTIONS)
            raise ValueError(f"{place}: members may differ in {known}, not in {section!r}; set it for the whole study")
        try:
            apply_override(document, override)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    return recipe_of(document, place)


def recipe_of(document: dict[str, Any], place: str) -> Recipe:
    """Validate what a recipe's TOML, or ``recipe_document``, holds; ValueError, whose lines begin with ``place``."""
    try:
        refuse_odd_values(document)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        problems = [problem for problem in error.errors() if not _is_echo(problem)]
        raise ValueError("\n".join(f"{place}: {_explain(problem)}" for problem in problems)) from error


def _is_echo(problem: Mapping[str, Any]) -> bool:
    """Say whether pydantic only repeats, as a list too short, that it refused one of the list's items."""
    return problem["type"] == "too_short" and bool(problem["input"])


def _explain(problem: Mapping[str, Any]) -> str:
    """One line: section, key, what was found, what was expected."""
    kind, context, message = problem["type"], problem.get("ctx", {}), str(problem["msg"])
    if kind == "value_error":
        return message.removeprefix("Value error, ")  # ours: names its section itself
    if kind.startswith("union_tag"):
        return _explain_tag(problem)
    place = _place(problem["loc"])
    section, key = ".".join(place[:-1]) or "top level", place[-1] if place else ""
    if kind == "extra_forbidden":
        others = [f'"{other}"' for other, model in _kinds_of(problem["loc"]).items() if key in model.model_fields]
        if others:
            return f"[{section}] {key} = {shown(problem['input'])} acts on kind = {' or '.join(others)} only; remove the key"
        return f"[{section}] {key} is not a known key; {_hint(key, _known_keys(problem['loc']))}"
    if kind == "missing":
        return f"[{section}] {key} is missing; it has no default"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        expected = "expected a table"
    elif kind == "tuple_type" and place[0] == "study":
        expected = 'expected a list of overrides, e.g. ["labels.num_negatives=2"]'
    elif kind == "tuple_type":
        expected = f"expected a list of tables, e.g. [[{'.'.join(place)}]]"
    elif kind == "too_short":
        expected = f"expected at least {context['min_length']} item"
    else:
        expected = f"{message[:1].lower()}{message[1:]}"
    return f"[{section}] {key} = {shown(problem['input'])}: {expected}"


def _explain_tag(problem: Mapping[str, Any]) -> str:
    """Explain a miner or teacher whose ``kind`` is missing or unknown."""
    section, found = ".".join(_place(problem["loc"])), problem["input"].get("kind")
    what = "miner" if problem["loc"][0] == "mining" else "teacher"
    kinds = list(_kinds_of((*problem["loc"], "kind")))
    if problem["type"] == "union_tag_not_found":
        return f"[{section}] kind is missing; expected one of: {', '.join(kinds)}"
    return f"[{section}] kind = {shown(found)} is not a known {what}; {_hint(str(found), kinds)}"


def _hint(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"expected one of: {', '.join(known)}"


_MINERS: dict[str, type[BaseModel]] = {
    "bm25": BM25Miner,
    "dense": DenseMiner,
    "sparse": SparseMiner,
    "run": RunMiner,
    "random": RandomMiner,
}
_TEACHERS: dict[str, type[BaseModel]] = {
    "dense": Teacher,
    "cross-encoder": Teacher,
    "sparse": Teacher,
    "late-interaction": Teacher,
    "causal-lm": CausalLMTeacher,
    "seq2seq-lm": Seq2SeqLMTeacher,
    "callable": CallableTeacher,
    "bm25": BM25Teacher,
    "file": FileTeacher,
}
_KINDS: dict[str, dict[str, type[BaseModel]]] = {
    "miners": _MINERS,
    "fallback": _MINERS,
    "teachers": _TEACHERS,
}
_MODELS: dict[str, type[BaseModel]] = {
    "collection": Collection,
    "mining": Mining,
    "filter": NegativeFilter,
    "student_miner": StudentMiner,
    "labels": Labels,
    "calibration": Calibration,
    "calibrations": Calibration,
    "rescale": Calibration,
    "student": Student,
    "budget": Budget,
    "training": Training,
    "train_teacher": TrainTeacher,
    "evaluation": Evaluation,
    "run": Run,
    "study": Study,
}


def _place(location: Sequence[str | int]) -> list[str]:
    """Return the location without the tag (its kind) that pydantic puts after an item's position: no place in the file."""
    parts = [key_shown(str(part)) for part in location]
    tag = {("mining", "miners"): 3, ("mining", "fallback"): 2, ("teachers",): 2}
    place = next((place for section, place in tag.items() if parts[: len(section)] == [*section]), len(parts))
    return parts[:place] + parts[place + 1 :]


def _kinds_of(location: Sequence[str | int]) -> dict[str, type[BaseModel]]:
    """Model by kind of the list that ``location`` lies in; empty where there is none."""
    return next((_KINDS[str(part)] for part in location[:-1] if part in _KINDS), {})


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """Keys of the model that refused the unknown key at the end of ``location``."""
    model: type[BaseModel] = Recipe
    for part in location[:-1]:
        if model is not Calibration:  # what follows calibrations is a teacher's name, which may read like a section's
            model = (_MODELS | _kinds_of(location)).get(str(part), model)
    return list(model.model_fields)
