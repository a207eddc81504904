"""What a page leaves out of its examples, besides the texts, where a collection's texts may not be published.

A query's own terms are the query in another order, and a passage's come close to it, so they go with the texts. Expansions are the
student's words, not the author's: they stay, and so do ids, judgements and scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def without_own_terms(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``examples.json`` says of a query without terms that a text holds; dims that are no terms stay.

    Of the terms that made a score those stay that are expansions on both sides; one that is too light to be told apart goes. What
    was left out is counted: ``query_terms_withheld``, ``passage_terms_withheld``, ``matches_withheld``, and of the latter the part
    of the score, ``score_withheld``.

    >>> told = {"query_terms": [["sun", 2.0, True], ["sky", 1.0, False]], "passage_terms": [["sky", 0.5, False]]}
    >>> left = without_own_terms({**told, "matches": [["sky", 1.0, 0.5, 0.5], ["sun", 2.0, 1.0, 2.0]]})
    >>> left["query_terms"], left["query_terms_withheld"], left["matches"], left["score_withheld"]
    ([['sky', 1.0, False]], 1, [['sky', 1.0, 0.5, 0.5]], 2.0)
    """
    left = dict(told)
    shown: list[set[str]] = []
    for side in ("query_terms", "passage_terms"):
        if side in told:
            left[side] = [term for term in told[side] if not term[2]]  # None: a dim that is no term
            left[f"{side}_withheld"] = len(told[side]) - len(left[side])
            shown.append({term for term, _, _ in left[side]})
    if "matches" in told:
        are_terms = any(is_own is not None for _, _, is_own in told["query_terms"])
        left["matches"] = [match for match in told["matches"] if not are_terms or all(match[0] in terms for terms in shown)]
        left["matches_withheld"] = len(told["matches"]) - len(left["matches"])
        left["score_withheld"] = sum(product for *_, product in told["matches"]) - sum(product for *_, product in left["matches"])
    return left
