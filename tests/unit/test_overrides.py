"""Laws of ``--set``: which key it changes, to what, and every message that refuses it. Imports no torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.overrides import apply_override

DOCUMENT: dict[str, Any] = {
    "mining": {"miners": [{"kind": "bm25", "quota": 4}, {"kind": "dense", "quota": 4}]},
    "teachers": [{"name": "t", "kind": "dense", "model": "m"}],
    "student": {"model": "s"},
}


def changed(override: str, document: dict[str, Any] = DOCUMENT) -> dict[str, Any]:
    copied = copy.deepcopy(document)
    apply_override(copied, override)
    return copied


def refusal(override: str, document: dict[str, Any] = DOCUMENT) -> str:
    with pytest.raises(ValueError, match="--set") as caught:
        changed(override, document)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        (" 3 ", 3),
        ("1e-4", 1e-4),
        ("false", False),
        ("[1, 2]", [1, 2]),
        ("{t = 2.5}", {"t": 2.5}),
        ("'a b'", "a b"),
        ("'3'", "3"),
        ("package:NAME", "package:NAME"),
        ("/data/x", "/data/x"),
        ("a=b", "a=b"),
        ("True", "True"),
        ("1O0", "1O0"),
        ("", ""),
    ],
)
def test_a_value_is_read_as_toml_and_a_bare_word_as_text(text: str, value: object) -> None:
    assert changed(f"student.model={text}")["student"]["model"] == value


def test_nothing_else_changes() -> None:
    after = changed("student.model=x")

    assert after == {**DOCUMENT, "student": {"model": "x"}}


def test_a_missing_section_is_made() -> None:
    assert changed("labels.calibration.kind=zscore")["labels"] == {"calibration": {"kind": "zscore"}}


def test_spaces_around_keys_do_not_matter() -> None:
    assert changed(" student . model = x") == changed("student.model=x")


@pytest.mark.parametrize("item", ["t", "dense", "0"], ids=["name", "kind", "position"])
def test_a_list_item_is_found_by(item: str) -> None:
    assert changed(f"teachers.{item}.max_length=64")["teachers"][0]["max_length"] == 64


def test_a_name_goes_before_a_kind() -> None:
    teachers = [{"name": "a", "kind": "dense"}, {"name": "dense", "kind": "cross-encoder"}]

    after = changed("teachers.dense.max_length=64", {"teachers": teachers})

    assert ["max_length" in teacher for teacher in after["teachers"]] == [False, True]


def test_a_name_with_dots_is_reached_by_quoting_it() -> None:
    after = changed('teachers."v1.5".max_length=64', {"teachers": [{"name": "v1.5"}]})

    assert after == {"teachers": [{"name": "v1.5", "max_length": 64}]}


SHAPE = "expected section.key=value, e.g. --set training.max_steps=100"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps", SHAPE),
        ("max_steps=3", SHAPE),
        ("training.=3", SHAPE),
        ("=3", SHAPE),
        ("", SHAPE),
        ("student.model.name=x", "'model' is a value, not a section"),
        ("teachers.max_length=3", "'teachers' is a list; name the item first, e.g. teachers.NAME.max_length=256"),
        ("teachers.u.max_length=3", "no item 'u' in the list; expected one of ['t'] or a position, from 0"),
        ("teachers.-1.max_length=3", "no item '-1' in the list; expected one of ['t'] or a position, from 0"),
        ("mining.miners.x.quota=3", "no item 'x' in the list; expected one of ['bm25', 'dense'] or a position, from 0"),
        ("labels.weights={t = ", "the value is not valid TOML: Invalid value (at end of document)"),
        ('student.model="s', "the value is not valid TOML: Unterminated string (at end of document)"),
    ],
)
def test_what_leads_nowhere_is_refused(override: str, message: str) -> None:
    assert refusal(override) == f"--set {override}: {message}"


def test_what_could_mean_two_items_is_refused() -> None:
    said = refusal("miners.dense.quota=3", {"miners": [{"kind": "dense"}, {"kind": "dense"}]})

    assert said == "--set miners.dense.quota=3: 2 items are called 'dense'; use the position, from 0"


def test_a_list_of_plain_values_has_no_keys() -> None:
    said = refusal("teachers.0.max_length=3", {"teachers": [1]})

    assert said == "--set teachers.0.max_length=3: '0' is a value, not a section"


def test_a_line_break_cannot_bring_in_a_second_key() -> None:
    after = changed("student.model=1\nseed = 2")

    assert after["student"] == {"model": "1\nseed = 2"}


@settings(deadline=None)  # the machine may be busy
@given(st.text(max_size=40))
def test_any_text_changes_the_document_or_is_refused_by_name(text: str) -> None:
    for override in (text, f"student.model={text}", f"{text}=1", f"teachers.{text}.max_length=64"):
        try:
            changed(override)
            said = f"--set {override}: "
        except ValueError as error:
            said = str(error)
        assert said.startswith(f"--set {override}: ")
