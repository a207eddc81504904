"""A score table in another project's layout, published by one rename, with a manifest of what it was made from.

Texts come from the collection that the table was made from; one that has changed since is refused. An existing target is refused
too; told to, an earlier export is replaced, anything else never is.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sparsekd.artifact import MANIFEST, read_manifest
from sparsekd.collection.beir import collection_digest, read_texts
from sparsekd.exchange.layouts import LAYOUTS, Layout
from sparsekd.exchange.target import exported, require_free
from sparsekd.exchange.writers import Source, write_layout
from sparsekd.labels.score_table import ScoreTable
from sparsekd.provenance import provenance

EXPORT_STAGE = "exchange/export v1"
_TEXT_FILES = ("corpus.jsonl", "queries.jsonl")

_log = logging.getLogger(__name__)


def export_table(
    layout: Layout, table_folder: Path, target: Path, *, collection: Path | None = None, overwrite: bool = False
) -> int:
    """Write a published table as ``target``, a new folder; return its rows. Nothing is left if anything fails.

    ``collection`` is where the table says unless given. Raises ValueError if the layout cannot hold the table's kind, the target
    exists, or the collection's texts are not those that the table was made from.
    """
    require_free(target, overwrite)
    table = ScoreTable.open(table_folder)
    if table.kind not in layout.kinds:
        fitting = [each.name for each in LAYOUTS.values() if table.kind in each.kinds]
        hint = f"it can be written as {', '.join(fitting)}" if fitting else "no layout holds vectors"
        raise ValueError(
            f"{table_folder}: holds labels of kind {table.kind!r}, which layout {layout.name} cannot carry (it takes "
            f"{', '.join(layout.kinds)}); {hint}"
        )
    fields: dict[str, Any] = {"stage": EXPORT_STAGE, "layout": layout.name, "table": table.key}
    queries: dict[str, str] = {}
    passages: dict[str, str] = {}
    if layout.refers_to == "texts":
        place = _collection_of(table) if collection is None else collection
        fields["collection"] = _checked_digest(table, place)
        queries, passages = read_texts(place)
    contract: dict[str, Any] = {"kind": table.kind, "teachers": table.teachers, "calibration": table.calibration}
    if table.contract.rescale is not None:
        contract["rescale"] = dict(table.contract.rescale)
    extra: dict[str, Any] = {**provenance(()), "labels": contract}
    with exported(target, fields=fields, extra=extra, overwrite=overwrite) as temporary:
        num_rows = write_layout(layout, Source(table, queries, passages), temporary)
        extra["counts"] = {"rows": num_rows}
    return num_rows


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
