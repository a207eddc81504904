"""Token ids are those of the library's own preprocess, made once, found again, and never believed when they have changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.artifact import IntegrityError
from sparsekd.recipe import Recipe
from sparsekd.students.building import build_student
from sparsekd.training.tokens import TokenizedTexts, tokenized_texts

TEXTS = ["a cat", "", "the dog and the bird", "a cat", "x " * 40, "war in France", "the   dog\n", "日本 [SEP] q!"]


@pytest.fixture
def transformer(make_recipe: Callable[..., Recipe]) -> Any:
    recipe = make_recipe(student={"max_length": 16})
    return build_student(recipe.student, Path(recipe.student.model))[0]


def library_ids(transformer: Any, text: str, prompt: str = "") -> list[int]:
    """Token ids by the library, text by text, so that no padding is in them."""
    ids: list[int] = transformer.preprocess([text], prompt=prompt or None)["input_ids"][0].tolist()
    return ids


@pytest.mark.parametrize("prompt", ["", "search: ", "the "])
def test_ids_are_those_of_the_librarys_preprocess(transformer: Any, tmp_path: Path, prompt: str) -> None:
    kept = tokenized_texts(transformer, {prompt: TEXTS}, cache=tmp_path)

    found = kept.ids(TEXTS, prompt)

    assert [ids.tolist() for ids in found] == [library_ids(transformer, text, prompt) for text in TEXTS]
    assert all(ids.dtype == np.int32 for ids in found)


def test_a_text_under_two_prompts_has_two_entries_and_one_said_twice_has_one(transformer: Any, tmp_path: Path) -> None:
    kept = tokenized_texts(transformer, {"": ["a cat", "a cat"], "the ": ["a cat"]}, cache=tmp_path)

    assert len(kept) == 2
    assert kept.ids(["a cat"])[0].tolist() == library_ids(transformer, "a cat")
    assert kept.ids(["a cat"], "the ")[0].tolist() == library_ids(transformer, "the a cat")


def test_the_same_words_under_two_prompts_are_one_entry(transformer: Any, tmp_path: Path) -> None:
    kept = tokenized_texts(transformer, {"": ["the cat"], "the ": ["cat"]}, cache=tmp_path)

    assert len(kept) == 1
    assert kept.ids(["cat"], "the ")[0].tolist() == kept.ids(["the cat"])[0].tolist() == library_ids(transformer, "the cat")


def test_texts_of_many_batches_keep_their_ids(transformer: Any, tmp_path: Path) -> None:
    texts = [f"{number} cat" for number in range(9000)]

    kept = tokenized_texts(transformer, {"": texts}, cache=tmp_path)

    assert len(kept) == 9000
    chosen = texts[::-997]
    assert [ids.tolist() for ids in kept.ids(chosen)] == [library_ids(transformer, text) for text in chosen]


def test_texts_cut_at_the_limit_are_counted(transformer: Any, tmp_path: Path) -> None:
    texts = [" ".join(["cat"] * length) for length in range(30)]  # two special tokens: 14 fit, 15 do not

    assert tokenized_texts(transformer, {"": texts}, cache=tmp_path).num_cut == sum(length > 14 for length in range(30))


def test_a_second_call_reads_what_the_first_has_kept(transformer: Any, tmp_path: Path) -> None:
    tokenized_texts(transformer, {"": TEXTS}, cache=tmp_path)
    (path,) = (tmp_path / "tokens").glob("*/tokens.arrow")
    before = path.stat().st_mtime_ns
    transformer.preprocess(["leaves truncation and padding in the tokenizer"])

    tokenized_texts(transformer, {"": reversed(TEXTS)}, cache=tmp_path)

    assert list((tmp_path / "tokens").glob("*/tokens.arrow")) == [path]
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("change", ["texts", "prompt", "max_length", "vocabulary", "case"])
def test_whatever_changes_the_ids_has_a_key_of_its_own(transformer: Any, tmp_path: Path, change: str) -> None:
    tokenized_texts(transformer, {"": TEXTS}, cache=tmp_path)
    texts = {"": TEXTS}
    if change == "texts":
        texts = {"": [*TEXTS, "one more"]}
    elif change == "prompt":
        texts = {"the ": TEXTS}
    elif change == "max_length":
        transformer.max_seq_length = 8
    elif change == "vocabulary":
        transformer.tokenizer.add_tokens(["zebra"])
    else:
        from tokenizers.normalizers import BertNormalizer

        transformer.tokenizer.backend_tokenizer.normalizer = BertNormalizer(lowercase=False)

    kept = tokenized_texts(transformer, texts, cache=tmp_path)

    assert len(list((tmp_path / "tokens").iterdir())) == 2
    (prompt,) = texts
    assert kept.ids(["war in France"], prompt)[0].tolist() == library_ids(transformer, "war in France", prompt)


def test_an_unknown_text_is_an_error(transformer: Any, tmp_path: Path) -> None:
    kept = tokenized_texts(transformer, {"": TEXTS}, cache=tmp_path)

    for texts, prompt in ((["a bird"], ""), (["a cat"], "the "), (["a cat", "a bird"], "")):
        with pytest.raises(KeyError, match="not tokenised: "):
            kept.ids(texts, prompt)


def test_no_texts_are_no_error(transformer: Any, tmp_path: Path) -> None:
    kept = tokenized_texts(transformer, {}, cache=tmp_path)

    assert isinstance(kept, TokenizedTexts)
    assert (len(kept), kept.num_cut, kept.ids([])) == (0, 0, [])


@pytest.mark.parametrize("place", [100, -300])
def test_a_changed_byte_is_refused(transformer: Any, tmp_path: Path, place: int) -> None:
    tokenized_texts(transformer, {"": TEXTS}, cache=tmp_path)
    (path,) = (tmp_path / "tokens").glob("*/tokens.arrow")
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)

    with pytest.raises(IntegrityError, match=r"tokens\.arrow: checksum .*, its manifest says .*; remove .* and rerun"):
        tokenized_texts(transformer, {"": TEXTS}, cache=tmp_path)


def test_ids_that_the_tokenizer_no_longer_gives_are_refused(transformer: Any, tmp_path: Path) -> None:
    class Shouting(type(transformer.tokenizer)):  # type: ignore[misc]
        """A tokenizer whose ids come from code that its state does not show."""

        def __call__(self, texts: Any, **kwargs: Any) -> Any:
            return super().__call__([f"{text} war" for text in texts], **kwargs)

    Shouting.__name__ = type(transformer.tokenizer).__name__
    tokenized_texts(transformer, {"": TEXTS}, cache=tmp_path)
    transformer.tokenizer.__class__ = Shouting

    with pytest.raises(IntegrityError, match=r"the tokenizer now gives other ids for .*; remove the folder and rerun"):
        tokenized_texts(transformer, {"": TEXTS}, cache=tmp_path)


def test_a_text_that_is_no_unicode_is_named(transformer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"text 1 .* is not valid Unicode"):
        tokenized_texts(transformer, {"": ["a cat", "\udcff"]}, cache=tmp_path)
