"""What an engine calls a dim: its term, written so that the engine takes it and no two dims share a name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sparsekd.collection.reading import shown


def dim_names(terms: Sequence[str] | None, dimension: int, *, forbidden: str = "", max_length: int | None = None) -> list[str]:
    """Return the name of every dim: its term, or its number where dims are no terms.

    If any term holds a character of ``forbidden`` (a regular expression's class), such characters and ``%`` are percent-encoded
    (RFC 3986, section 2.1) in all terms, so names stay apart. ``max_length`` counts UTF-16 units, as Java does. Raises ValueError
    if there are not ``dimension`` terms, a name is empty or too long, or two dims have the same.

    >>> dim_names(["air", ".", "_", "5%"], 4, forbidden="[.]")
    ['air', '%2E', '_', '5%25']
    >>> dim_names(None, 3)
    ['0', '1', '2']
    """
    if terms is None:
        return [str(dim) for dim in range(dimension)]
    if len(terms) != dimension:
        raise ValueError(f"the student has {dimension} dims and {len(terms)} terms; expected one term each")
    names = list(terms)
    if forbidden and any(re.search(forbidden, name) for name in names):
        names = [re.sub(f"{forbidden}|%", _encoded, name) for name in names]
    seen: dict[str, int] = {}
    for dim, name in enumerate(names):
        if not name or (max_length is not None and len(name.encode("utf-16-le")) // 2 > max_length):
            expected = "a name" if not name else f"at most {max_length} characters"
            raise ValueError(f"dim {dim}: the engine cannot hold its term {shown(name)}; expected {expected}")
        if seen.setdefault(name, dim) != dim:
            raise ValueError(f"dims {seen[name]} and {dim}: both are the term {shown(name)}; expected each term once")
    return names


def _encoded(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match.group().encode("utf-8"))
