"""The engines that an index goes out to: what each needs installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sparsekd.engines.anserini import write_anserini
from sparsekd.engines.bulk import write_elasticsearch, write_opensearch
from sparsekd.engines.qdrant import write_qdrant, write_qdrant_upserts
from sparsekd.engines.quantisation import QuantisationLoss
from sparsekd.engines.seismic import write_seismic
from sparsekd.engines.vectors import Source
from sparsekd.engines.vespa import write_vespa


@dataclass(frozen=True)
class Engine:
    """A name, what writes its files, and the module and distribution that builds its index, where one does."""

    name: str
    write: Callable[[Source, Path], QuantisationLoss]
    module: str | None = None
    distribution: str | None = None

    def require(self) -> None:
        """Raise ValueError with what to install if the engine is not."""
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            raise ValueError(
                f"engine {self.name}: needs the package {self.distribution}, which is not installed; make setup EXTRAS=cpu,export, "
                "or pip install 'sparsekd[export]'"
            )

    def version(self) -> str | None:
        """Return the version of what builds the index; None where nothing but this project writes it."""
        return None if self.distribution is None else importlib.metadata.version(self.distribution)


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("seismic", write_seismic, "seismic", "pyseismic-lsr"),
        Engine("qdrant", write_qdrant, "qdrant_edge", "qdrant-edge-py"),
        Engine("qdrant-upserts", write_qdrant_upserts),
        Engine("anserini", write_anserini),
        Engine("elasticsearch", write_elasticsearch),
        Engine("opensearch", write_opensearch),
        Engine("vespa", write_vespa),
    )
}


def engine_of(name: str) -> Engine:
    """Return the engine; ValueError with the known ones otherwise."""
    if name not in ENGINES:
        raise ValueError(f"engine {name!r}: expected one of {', '.join(ENGINES)}")
    return ENGINES[name]
