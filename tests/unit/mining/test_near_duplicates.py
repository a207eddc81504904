from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekd.mining.near_duplicates import NearDuplicates, words_of

WORDS = st.lists(st.sampled_from("one two three four five six seven".split()), max_size=8)


@pytest.mark.parametrize("text", ["the cat is big ", "The cat is BIG.", "the\ncat: is big", "\uff54\uff48\uff45 cat is big"])
def test_case_punctuation_spacing_and_width_make_no_other_text(text: str) -> None:
    assert NearDuplicates(["the cat is big"], 1.0).matches(text)


def test_at_1_the_same_words_in_another_order_are_one_text_and_a_word_more_is_another() -> None:
    near = NearDuplicates(["the cat is big"], 1.0)

    assert near.matches("big is the cat")
    assert not near.matches("the cat is very big")


def test_the_threshold_is_the_smallest_jaccard_similarity_that_counts() -> None:
    near = NearDuplicates(["a b c d e f g h i"], 0.9)  # nine words

    assert near.matches("a b c d e f g h i j")  # 9 / 10
    assert not near.matches("a b c d e f g h j")  # 8 / 10


def test_texts_without_words_are_near_each_other_only() -> None:
    near = NearDuplicates(["...", "a b"], 0.1)

    assert near.matches("!")
    assert not near.matches("c")


@given(WORDS, WORDS, st.floats(0.05, 1.0))
def test_near_agrees_with_the_formula(left: list[str], right: list[str], threshold: float) -> None:
    union = set(left) | set(right)
    shared = set(left) & set(right)

    found = NearDuplicates([" ".join(left)], threshold).matches(" ".join(right))

    assert found is (left == right or (bool(shared) and len(shared) >= threshold * len(union)))
    assert words_of(" ".join(left)) == left
