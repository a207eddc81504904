"""A score table in another project's layout, published by one rename, with a manifest of what it was made from.

Texts come from the collection that the table was made from; one that has changed since is refused. An existing target is refused
too; told to, an earlier export is replaced, anything else never is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsekd.exchange.layouts import LAYOUTS, Layout
from sparsekd.exchange.source import Source, read_source
from sparsekd.exchange.target import exported, require_free
from sparsekd.exchange.writers import write_layout
from sparsekd.labels.score_table import ScoreTable
from sparsekd.provenance import provenance

EXPORT_STAGE = "exchange/export v1"


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
    source = Source(table, {}, {})
    if layout.refers_to == "texts":
        source, fields["collection"] = read_source(table, collection)
    contract: dict[str, Any] = {"kind": table.kind, "teachers": table.teachers, "calibration": table.calibration}
    if table.contract.rescale is not None:
        contract["rescale"] = dict(table.contract.rescale)
    extra: dict[str, Any] = {**provenance(()), "labels": contract}
    with exported(target, overwrite=overwrite, fields=fields, extra=extra) as folder:
        num_rows = write_layout(layout, source, folder)
        extra["counts"] = {"rows": num_rows}
    return num_rows
