"""Texts that say the same in nearly the same words: a positive's copy under another id is no negative.

Words are runs of letters, digits and underscores of the NFKC-normalised, case-folded text; punctuation and spacing do not count.
Costs the words of every text asked about, a few microseconds a sentence.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """Return the normalised words of a text, in order.

    >>> words_of("The  Cat, sat!")
    ['the', 'cat', 'sat']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class NearDuplicates:
    """Some texts, of which others may be near-duplicates."""

    def __init__(self, texts: Iterable[str], threshold: float) -> None:
        """Take ``threshold``, the smallest Jaccard similarity of word sets that counts: shared words / all words, in (0, 1]."""
        self._threshold = threshold
        words = [words_of(text) for text in texts]
        self._normalised = {" ".join(each) for each in words}
        self._sets = [frozenset(each) for each in words]

    def matches(self, text: str) -> bool:
        """Return whether ``text`` has the words of one of the texts in their order, or shares enough of them."""
        words = words_of(text)
        if " ".join(words) in self._normalised:
            return True
        found = frozenset(words)
        for known in self._sets:
            shared = len(found & known)
            if shared and shared >= self._threshold * (len(found) + len(known) - shared):
                return True
        return False
