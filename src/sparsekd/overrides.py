"""``--set section.key=value``: one key of a recipe's document changed before validation.

Keys and values are read as TOML, so quoting works as in the file; a value that is a bare word is a string. Where a name could
mean two things it is refused, never guessed. What the key may hold is for the recipe's models to say.
"""

from __future__ import annotations

import tomllib
from typing import Any


def apply_override(document: dict[str, Any], override: str) -> None:
    """Set one dotted key in place; a list item is named by its ``name``, its ``kind`` or its position from 0.

    Raises ValueError if it is not ``section.key=value`` or leads nowhere.
    """
    keys, value = _parse_override(override)
    place: Any = document
    for key in keys[:-1]:
        place = _item(place, key, override) if isinstance(place, list) else place.setdefault(key, {})
        if not isinstance(place, dict | list):
            raise ValueError(f"--set {override}: {key!r} is a value, not a section")
    if isinstance(place, list):
        raise ValueError(f"--set {override}: {keys[-2]!r} is a list; name the item first, e.g. teachers.NAME.max_length=256")
    place[keys[-1]] = value


def _parse_override(override: str) -> tuple[list[str], Any]:
    """Split ``a.b=value`` into keys and value, both read as TOML; a value that is a bare word is a string.

    >>> _parse_override('teachers."bge-v1.5".model=package:NAME')
    (['teachers', 'bge-v1.5', 'model'], 'package:NAME')
    """
    dotted, equals, text = override.partition("=")
    keys: list[str] = []
    try:
        nested: Any = tomllib.loads(f"{dotted} = 0") if equals else 0
        while isinstance(nested, dict):
            [(key, nested)] = nested.items()
            keys.append(key)
    except ValueError:
        keys = []
    if len(keys) < 2:
        raise ValueError(f"--set {override}: expected section.key=value, e.g. --set training.max_steps=100")
    try:
        [(_, value)] = tomllib.loads(f"value = {text}").items()  # a line break could smuggle in a second key
        return keys, value
    except (ValueError, RecursionError) as error:
        if text.lstrip()[:1] in ("'", '"', "[", "{"):  # meant as TOML, so not a bare word
            raise ValueError(f"--set {override}: the value is not valid TOML: {error}") from error
        return keys, text.strip()


def _item(items: list[Any], key: str, override: str) -> Any:
    """Return the one item that ``key`` names."""
    tables = [item if isinstance(item, dict) else {} for item in items]
    for names in (
        [table.get("name") for table in tables],
        [table.get("kind") for table in tables],
        [str(position) for position in range(len(items))],
    ):
        if names.count(key) == 1:
            return items[names.index(key)]
        if key in names:
            raise ValueError(f"--set {override}: {names.count(key)} items are called {key!r}; use the position, from 0")
    known = [table.get("name") or table.get("kind") for table in tables]
    raise ValueError(f"--set {override}: no item {key!r} in the list; expected one of {known} or a position, from 0")
