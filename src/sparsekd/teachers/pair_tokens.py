"""Token ids of (query, passage) pairs, each text tokenized once and joined as the tokenizer's own pair encoding would.

A tokenizer encodes the two texts of a pair apart and puts its template's special tokens around them, so ids of a text serve every
pair it is in. The template is read off one encoded pair and checked on others. Only passages are cut to the limit. Holds the ids of
the last call's texts, so what recurs in the next call, as queries do in each shard, is not tokenized again. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

_PROBES = (("what is it", "a text"), ("q", "p"), ("x", ""), ("a b c d", "the passage of a pair is 42 words long, or not"))
_TEXTS_AT_ONCE = 1024  # the tokenizer's lists of Python integers take ten times the arrays' memory


@dataclass(frozen=True)
class PairTemplate:
    """Special tokens before, between and after the texts, and the token type of each of the five parts where there are types."""

    before: Ids
    between: Ids
    after: Ids
    types: tuple[int, ...] | None

    @property
    def num_special(self) -> int:
        """Special tokens of a pair."""
        return len(self.before) + len(self.between) + len(self.after)


@dataclass(frozen=True)
class PairTokens:
    """Tokens of pairs, passages cut to the limit; equal texts share their array."""

    pairs: Sequence[tuple[str, str]]
    queries: list[Ids]
    passages: list[Ids]
    lengths: NDArray[np.int64]
    """Tokens of each pair, special ones included."""
    template: PairTemplate

    def flat(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Return ids and token types, int64 [T], of these pairs one after the other; no types where the tokenizer has none."""
        template = self.template
        parts: list[Ids] = []
        for position in positions:
            parts += [template.before, self.queries[position], template.between, self.passages[position], template.after]
        ids_T = np.concatenate(parts, dtype=np.int64)
        if template.types is None:
            return ids_T, None
        return ids_T, np.repeat(np.tile(np.array(template.types, np.int64), len(positions)), [len(part) for part in parts])


class PairTokenizer:
    """Tokenizes pairs and counts those it cuts; for one thread at a time."""

    def __init__(self, tokenizer: Any, limit: int | None, teacher: str) -> None:
        """Read the pair template of a transformers tokenizer; ValueError if it has none, or one that cannot be relied on.

        ``limit`` in tokens of a pair, special ones included; None for no limit. ``teacher`` is its name, for messages.
        """
        self.num_truncated = 0
        self.limit = limit
        self._tokenizer, self._teacher = tokenizer, teacher
        self._known: dict[str, Ids] = {}
        self._template = self._read_template()

    @property
    def has_types(self) -> bool:
        """Whether the tokenizer tells the parts of a pair apart by token types."""
        return self._template.types is not None

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> PairTokens:
        """Tokenize pairs; ValueError if a query alone leaves no room for a passage, naming how many and the first."""
        unique = list(dict.fromkeys(text for pair in pairs for text in pair))
        fresh = [text for text in unique if text not in self._known]
        ids_by_text = {text: self._known[text] for text in unique if text in self._known} | self._encode(fresh)
        self._known = ids_by_text
        queries = [ids_by_text[query] for query, _ in pairs]
        passages = [ids_by_text[passage] for _, passage in pairs]
        if self.limit is not None:
            self._refuse_long_queries({query: ids_by_text[query] for query, _ in pairs})
            passages = [self._cut(passage, len(query)) for query, passage in zip(queries, passages, strict=True)]
        lengths = np.array([len(query) + len(passage) for query, passage in zip(queries, passages, strict=True)], dtype=np.int64)
        return PairTokens(pairs, queries, passages, lengths + self._template.num_special, self._template)

    def _encode(self, texts: Sequence[str]) -> dict[str, Ids]:
        """Return the ids of each text, without special tokens; of a longer text one more than the limit, so that a cut shows."""
        ids_by_text = {}
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            block = list(texts[start : start + _TEXTS_AT_ONCE])
            for text, ids in zip(block, self._ids(block), strict=True):
                ids_by_text[text] = np.array(ids if self.limit is None else self._side(ids, self.limit + 1), dtype=np.int32)
        return ids_by_text

    def _ids(self, texts: list[str]) -> list[list[int]]:
        settings = {"add_special_tokens": False, "return_attention_mask": False, "truncation": False, "verbose": False}
        ids: list[list[int]] = self._tokenizer(texts, **settings)["input_ids"]
        return ids

    def _encode_pair(self, query: str, passage: str) -> tuple[list[int], list[int] | None]:
        """Return the tokenizer's own ids and token types of a pair; in lists, since alone an empty passage is taken for none."""
        pair = self._tokenizer([query], [passage], truncation=False, verbose=False)
        return pair["input_ids"][0], pair["token_type_ids"][0] if "token_type_ids" in pair else None

    def _side(self, ids: Any, count: int) -> Any:
        """Return ``count`` tokens from the side that the tokenizer keeps."""
        if len(ids) <= count:
            return ids
        return ids[len(ids) - count :] if getattr(self._tokenizer, "truncation_side", "right") == "left" else ids[:count]

    def _cut(self, passage: Ids, query_length: int) -> Ids:
        room = (self.limit or 0) - self._template.num_special - query_length
        self.num_truncated += len(passage) > room
        cut: Ids = self._side(passage, room)
        return cut

    def _refuse_long_queries(self, ids_by_query: dict[str, Ids]) -> None:
        room = (self.limit or 0) - self._template.num_special
        too_long = [(query, ids) for query, ids in ids_by_query.items() if len(ids) >= room]
        if too_long:
            query, ids = too_long[0]
            length = f"over {self.limit}" if len(ids) > (self.limit or 0) else len(ids)
            raise ValueError(
                f"teacher {self._teacher!r}: {len(too_long)} of {len(ids_by_query)} queries leave no room for a passage "
                f"(first: {length} tokens, {query[:80]!r}); expected fewer than {room} within the limit of {self.limit}; "
                "raise max_length, or shorten the query in the collection"
            )

    def _read_template(self) -> PairTemplate:
        query, passage = _PROBES[0]
        query_ids, passage_ids = self._ids([query, passage])
        ids, types = self._encode_pair(query, passage)
        start = _find(ids, query_ids, 0)
        passage_start = _find(ids, passage_ids, max(start, 0) + len(query_ids))
        if start < 0 or passage_start < 0 or passage_start == start + len(query_ids):
            raise ValueError(
                f"teacher {self._teacher!r}: its tokenizer has no template for pairs: {query!r} and {passage!r} become {ids}, "
                f"expected {query_ids} and {passage_ids} with special tokens between them; use a checkpoint with a pair template"
            )
        stop = passage_start + len(passage_ids)
        before, between, after = (
            np.array(part, dtype=np.int32) for part in (ids[:start], ids[start + len(query_ids) : passage_start], ids[stop:])
        )
        template = PairTemplate(before, between, after, None)
        if types is not None:
            places = (0, start, start + len(query_ids), passage_start, min(stop, len(ids) - 1))
            template = PairTemplate(before, between, after, tuple(types[place] for place in places))
        self._check(template)
        return template

    def _check(self, template: PairTemplate) -> None:
        """Compare with the tokenizer's own pair encoding, token for token."""
        ids = [tuple(np.array(text, dtype=np.int32) for text in self._ids(list(probe))) for probe in _PROBES]
        queries, passages = [query for query, _ in ids], [passage for _, passage in ids]
        tokens = PairTokens(_PROBES, queries, passages, np.zeros(0, dtype=np.int64), template)
        for number, (query, passage) in enumerate(_PROBES):
            expected, expected_types = self._encode_pair(query, passage)
            found, types = tokens.flat(np.array([number]))
            if found.tolist() != expected or (None if types is None else types.tolist()) != expected_types:
                raise ValueError(
                    f"teacher {self._teacher!r}: its tokenizer encodes the pair {query!r}, {passage!r} as {expected}, but "
                    f"the texts apart and its special tokens make {found.tolist()}; expected a tokenizer that encodes the texts "
                    "of a pair independently; score with it elsewhere and import the scores"
                )


def _find(ids: list[int], part: list[int], start: int) -> int:
    """Return where ``part`` first stands in ``ids`` from ``start`` on, -1 if nowhere."""
    places = range(start, len(ids) - len(part) + 1)
    return next((place for place in places if ids[place : place + len(part)] == part), -1)
