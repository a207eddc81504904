"""What an export is made of: a score table and the texts of its ids, from the collection that the table was made from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparsekd.artifact import MANIFEST, read_manifest
from sparsekd.collection.beir import collection_digest, read_texts
from sparsekd.collection.reading import shown
from sparsekd.labels.score_table import ScoreTable

_TEXT_FILES = ("corpus.jsonl", "queries.jsonl")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A table and the texts of its ids."""

    table: ScoreTable
    queries: Mapping[str, str]
    passages: Mapping[str, str]

    def query(self, query_id: str) -> str:
        """Return the text of a query; ValueError if the collection lacks it."""
        return self._text(self.queries, query_id, "query", "queries.jsonl")

    def passage(self, passage_id: str) -> str:
        """Return the text of a passage; ValueError if the collection lacks it."""
        return self._text(self.passages, passage_id, "passage", "corpus.jsonl")

    def _text(self, texts: Mapping[str, str], text_id: str, kind: str, file: str) -> str:
        if text_id not in texts:
            raise ValueError(
                f"{self.table.artifact.folder}: {kind} {shown(text_id)} of the table is not in the collection's {file}; give the "
                "collection it was made from with --collection"
            )
        return texts[text_id]


def read_source(table: ScoreTable, collection: Path | None) -> tuple[Source, dict[str, str]]:
    """Return the table with its texts, and the digests of the files that hold them.

    ``collection`` is where the table says unless given. Raises ValueError if its texts are not those that were scored.
    """
    place = _collection_of(table) if collection is None else collection
    digest = _checked_digest(table, place)
    return Source(table, *read_texts(place)), digest


def _collection_of(table: ScoreTable) -> Path:
    path = table.artifact.manifest.get("recipe", {}).get("collection", {}).get("path")
    if not isinstance(path, str):
        raise ValueError(f"{table.artifact.folder}: does not say which collection it was made from; give it with --collection")
    return Path(path)


def _checked_digest(table: ScoreTable, collection: Path) -> dict[str, str]:
    """Return the digests of the collection's texts; ValueError if they are not those the table was made from."""
    if not collection.is_dir():
        raise FileNotFoundError(f"{collection}: no such folder; give the collection of the table with --collection")
    digest = collection_digest(collection, _TEXT_FILES)
    expected = _expected_digest(table)
    if expected is None:
        _log.warning("%s: its candidates are gone, so nothing says whether %s has changed", table.artifact.folder, collection)
        return digest
    for name in _TEXT_FILES:
        if expected.get(name) != digest[name]:
            raise ValueError(
                f"{collection / name}: is not the file that table {table.key} was made from (sha256 {digest[name][:12]}…, expected "
                f"{str(expected.get(name))[:12]}…); its texts may not be those that were scored: give the right --collection"
            )
    return digest


def _expected_digest(table: ScoreTable) -> dict[str, str] | None:
    """Return the collection's digests by file: an imported table has them, another's candidates do; None if those are gone."""
    fields = table.artifact.manifest["fields"]
    if isinstance(fields.get("collection"), dict):
        return dict(fields["collection"])
    candidates = table.artifact.folder.parent.parent / "candidates" / str(fields.get("candidates"))
    if not (candidates / MANIFEST).is_file():
        return None
    return dict(read_manifest(candidates)["fields"]["files"])
