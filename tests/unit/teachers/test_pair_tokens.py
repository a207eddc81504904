"""Texts tokenized apart and joined, against the tokenizer's own pair encoding."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.teachers.pair_tokens import PairTokenizer

Draw = Callable[..., list[str]]
WORDS = [
    "<pad>",
    "<unk>",
    "<s>",
    "</s>",
    *"the heat of a boundary layer is not old flow river school party queen number what it text".split(),
]
TEMPLATES = {
    "roberta": ("<s> $A </s> </s> $B </s>", True),
    "ends only": ("$A </s> $B </s>", True),
    "between only": ("$A </s> $B", True),
    "types": ("<s> $A </s> $B:1 </s>:1", True),
    "types over all": ("<s>:2 $A:0 </s>:0 $B:1 </s>:2", True),
}


def word_tokenizer(template: str | None) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if template is not None:
        special = [("<s>", 2), ("</s>", 3)]
        backend.post_processor = processors.TemplateProcessing(single="$A </s>", pair=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture
def bert_tokenizer(tiny_cross_encoder_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_cross_encoder_folder)


class Counting:
    """A tokenizer that remembers which texts it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.texts: list[str] = []

    def __call__(self, texts: Any, *arguments: Any, **keywords: Any) -> Any:
        self.texts += [] if arguments else texts
        return self._tokenizer(texts, *arguments, **keywords)


def own_encoding(tokenizer: Any, pairs: list[tuple[str, str]], limit: int | None) -> tuple[list[int], list[int]]:
    queries, passages = map(list, zip(*pairs, strict=True))
    cut = {"truncation": False} if limit is None else {"truncation": "only_second", "max_length": limit}
    tokens = tokenizer(queries, passages, verbose=False, **cut)
    return [*itertools.chain(*tokens["input_ids"])], [*itertools.chain(*tokens["token_type_ids"])]


@pytest.fixture
def pairs(draw_texts: Draw) -> list[tuple[str, str]]:
    drawn = list(zip(draw_texts(50, longest=8), draw_texts(50, longest=60, seed=1), strict=True))
    return [*drawn, (drawn[0][0], drawn[1][1]), ("", ""), ("heat", ""), ("", "heat"), ("[SEP] heat", "a [CLS] b\n\tc  d")]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("limit", [None, 40])
def test_joined_ids_and_types_are_berts_own_pair_encoding(
    bert_tokenizer: Any, pairs: list[tuple[str, str]], limit: int | None, side: str
) -> None:
    bert_tokenizer.truncation_side = side

    tokens = PairTokenizer(bert_tokenizer, limit, "t")(pairs)

    ids, types = tokens.flat(np.arange(len(pairs)))
    assert types is not None
    assert (ids.tolist(), types.tolist()) == own_encoding(bert_tokenizer, pairs, limit)
    assert tokens.lengths.sum() == len(ids)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("limit", [None, 30])
def test_joined_ids_and_types_are_those_of_any_template(pairs: list[tuple[str, str]], name: str, limit: int | None) -> None:
    tokenizer = word_tokenizer(TEMPLATES[name][0])

    ids, types = PairTokenizer(tokenizer, limit, "t")(pairs).flat(np.arange(len(pairs)))

    assert types is not None
    assert (ids.tolist(), types.tolist()) == own_encoding(tokenizer, pairs, limit)


def test_flat_gives_the_pairs_asked_for_in_that_order(bert_tokenizer: Any, pairs: list[tuple[str, str]]) -> None:
    ids, _ = PairTokenizer(bert_tokenizer, None, "t")(pairs).flat(np.array([7, 2]))

    assert ids.tolist() == own_encoding(bert_tokenizer, [pairs[7], pairs[2]], None)[0]


def test_each_text_is_tokenized_once_over_calls_that_share_it(bert_tokenizer: Any, pairs: list[tuple[str, str]]) -> None:
    counting = Counting(bert_tokenizer)
    tokenize = PairTokenizer(counting, 40, "t")
    counting.texts.clear()

    tokenize(pairs)
    tokenize([(pairs[0][0], "new"), *pairs])

    assert sorted(counting.texts) == sorted({text for pair in pairs for text in pair} | {"new"})


def test_a_passage_is_counted_as_cut_only_if_it_lost_a_token(bert_tokenizer: Any) -> None:
    tokenize = PairTokenizer(bert_tokenizer, 8, "t")  # [CLS] 2 words [SEP] 3 words [SEP]

    tokenize([("the heat", "of a wing"), ("the heat", "of a wing body"), ("heat", "of a wing body")])

    assert tokenize.num_truncated == 1


def test_a_tokenizer_without_a_pair_template_is_refused() -> None:
    message = r"teacher 't': its tokenizer has no template for pairs: 'what is it' and 'a text' become \[.*\], expected .* between"

    with pytest.raises(ValueError, match=message):
        PairTokenizer(word_tokenizer(None), None, "t")


def test_a_tokenizer_that_sees_the_pair_as_one_text_is_refused() -> None:
    class Depends:
        """Numbers words by their place in the pair."""

        def __call__(self, texts: list[str], passages: list[str] | None = None, **_: Any) -> dict[str, list[list[int]]]:
            def ids(text: str) -> list[int]:
                return [9 + len(word) for word in text.split()]

            if passages is None:
                return {"input_ids": [ids(text) for text in texts]}
            pairs = zip(texts, passages, strict=True)
            return {"input_ids": [[1, *ids(q), 1, *ids(p), *([2] if len(q) > 4 and len(p) > 9 else []), 1] for q, p in pairs]}

    with pytest.raises(ValueError, match="but the texts apart and its special tokens make"):
        PairTokenizer(Depends(), None, "t")
