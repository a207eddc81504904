"""What an engine calls a dim."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekd.engines.names import dim_names


def test_terms_that_the_engine_takes_are_left_alone() -> None:
    assert dim_names(["a", "5%", "##.b"], 3, forbidden="[ ]") == ["a", "5%", "##.b"]


@given(st.lists(st.text(alphabet=".%2E_ab日", min_size=1), unique=True, min_size=1))
def test_names_never_meet_and_hold_nothing_forbidden(terms: list[str]) -> None:
    names = dim_names(terms, len(terms), forbidden="[.日]")

    assert len(set(names)) == len(terms)
    assert not any(set(name) & {".", "日"} for name in names)


def test_bytes_of_utf_8_are_encoded() -> None:
    assert dim_names(["日"], 1, forbidden="[日]") == ["%E6%97%A5"]


def test_a_length_counts_utf_16_units() -> None:
    assert dim_names(["😀"], 1, max_length=2) == ["😀"]
    with pytest.raises(ValueError, match=r"dim 0: the engine cannot hold its term '😀'; expected at most 1 characters"):
        dim_names(["😀"], 1, max_length=1)


def test_an_empty_term_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dim 1: the engine cannot hold its term ''; expected a name"):
        dim_names(["a", ""], 2)


def test_a_term_that_comes_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="dims 0 and 2: both are the term 'a'; expected each term once"):
        dim_names(["a", "b", "a"], 3)


def test_another_number_of_terms_than_dims_is_refused() -> None:
    with pytest.raises(ValueError, match="the student has 3 dims and 2 terms; expected one term each"):
        dim_names(["a", "b"], 3)
