"""A student's index as an engine's folder, published by one rename, with a manifest that says what the weights lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsekd.engines.catalogue import Engine
from sparsekd.engines.vectors import Source
from sparsekd.exchange.target import exported
from sparsekd.provenance import provenance

ENGINE_STAGE = "engines/export v1"


def export_engine(
    engine: Engine, source: Source, target: Path, *, index_key: str, overwrite: bool = False
) -> dict[str, float | int]:
    """Write ``source`` as ``target``, a new folder; return counts and quantisation loss. Nothing is left if anything fails.

    ``index_key`` names the index that the vectors are of. Raises ValueError if the engine is not installed, the target exists, the
    engine cannot hold a term, an id or a weight, or a weight is not finite or below 0.
    """
    engine.require()
    fields = {"stage": ENGINE_STAGE, "engine": engine.name, "version": engine.version(), "index": index_key}
    extra: dict[str, Any] = {**provenance(()), "names": "dims" if source.terms is None else "terms"}
    with exported(target, fields=fields, extra=extra, overwrite=overwrite) as folder:
        summary = engine.write(source, folder).summary()
        extra["quantisation"] = summary
    return summary
