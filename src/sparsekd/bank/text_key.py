"""Content keys: a text is known by 128 bits of its sha256, never by an id, a path or a row number.

About a million texts/s; digest each text once, not once per pair. Two of 10^12 texts share a key with probability 10^-15.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]


def text_keys(texts: Iterable[str]) -> Words:
    """Return uint64 [n, 2]: the first 16 bytes of sha256(utf-8 of the text as it is), as two little-endian words.

    Raises ValueError naming the first text that is not encodable (a lone surrogate).
    """
    digests = bytearray()
    for position, text in enumerate(texts):
        try:
            digests += hashlib.sha256(text.encode("utf-8")).digest()[:16]
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {position} ({text[:40]!r}) is not valid Unicode: {error.reason} at character {error.start}; "
                "repair the collection file"
            ) from error
    return np.frombuffer(bytes(digests), dtype="<u8").astype(np.uint64).reshape(-1, 2)


def check_keys(name: str, keys: Words) -> None:
    """Raise ValueError unless ``keys`` is a uint64 array [n, 2]."""
    if not isinstance(keys, np.ndarray) or keys.dtype != np.uint64 or keys.ndim != 2 or keys.shape[1] != 2:
        found = f"{keys.dtype} {list(keys.shape)}" if isinstance(keys, np.ndarray) else type(keys).__name__
        raise ValueError(f"{name}: expected uint64 [n, 2] as text_keys returns, found {found}")
