"""The score table: the contract between the stages. Ids and labels only, in Arrow IPC stream shards (``labels.contract``).

R rows, N passages, W labels, V dims of a vector. Opening reads every byte and checks every row (``labels.verification``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from sparsekd.artifact import Artifact, IntegrityError
from sparsekd.labels.contract import KIND, LABEL_COLUMNS, Contract, Kind, Role, read_metadata, refuse_other_scale, table_schema
from sparsekd.labels.verification import check_rows, matrix_of
from sparsekd.mining.shards import open_shards, read_shard

if TYPE_CHECKING:
    import scipy.sparse

_BY_KIND: dict[Kind, tuple[str, ...]] = {
    "score_list": ("SparseDistillKLDivLoss", "SparseMarginMSELoss"),
    "margin": ("SparseMarginMSELoss",),
    "none": ("SparseMultipleNegativesRankingLoss", "SparseTripletLoss"),
    "similarity": ("SparseCoSENTLoss", "SparseAnglELoss", "SparseCosineSimilarityLoss"),
    "embedding": ("SparseMSELoss",),
}
"""Main losses that learn from a kind's labels; for none, from the passages alone."""
_WITHOUT_LABELS = _BY_KIND["none"]
_TAKES: dict[Kind, str] = {
    "score_list": "score lists of {n} gold_sim",
    "margin": "{m} margins per row",
    "none": "{n} passages per row and no label",
    "similarity": "one similarity per (query, passage)",
    "embedding": "one vector per text",
}


@dataclass(frozen=True)
class ScoreTable:
    """A verified table."""

    artifact: Artifact
    shard_paths: list[Path]
    """In order; each loads with ``datasets.Dataset.from_file``."""
    kind: Kind
    contract: Contract

    @classmethod
    def open(cls, folder: Path) -> ScoreTable:
        """Verify and open a published table.

        Raises IntegrityError, naming the shard, if bytes, rows, metadata, columns or widths are not what was published, an id is
        empty, a row holds a passage twice, or a label is not finite; ValueError if two shards' labels are of two kinds or scales.
        """
        artifact, shards = open_shards(folder, KIND)
        if not shards:
            raise IntegrityError(f"{folder}: its manifest lists no shard; remove the folder and rerun")
        first = read_shard(shards[0], artifact).schema
        kind, contract = read_metadata(shards[0], first)
        expected = table_schema(kind, contract)
        for path in shards:
            table = read_shard(path, artifact)
            refuse_other_scale(path, table.schema, shards[0], first)
            if not table.schema.equals(expected, check_metadata=True):
                passages = f" of {contract.num_passages} passages" if contract.num_passages else ""
                raise IntegrityError(f"{path}: columns or metadata are not those of a {kind} table{passages}")
            check_rows(path, table, label_column=LABEL_COLUMNS[kind], dimension=contract.dimension)
        return cls(artifact, shards, kind, contract)

    @property
    def key(self) -> str:
        """The key the table was made under."""
        return self.artifact.key

    @property
    def num_passages(self) -> int:
        """N: passages per row, the positive included; 1 for similarity, 0 for embedding."""
        return self.contract.num_passages

    @property
    def teachers(self) -> list[dict[str, Any]]:
        """{"identity": key, "weight": factor} of each teacher that labels, and its "calibration" where they differ."""
        return [dict(teacher) for teacher in self.contract.teachers]

    @property
    def calibration(self) -> dict[str, Any]:
        """Settings that acted on every teacher's scores; empty where there are none, or each teacher has its own."""
        return dict(self.contract.calibration or {})

    @property
    def label_column(self) -> str | None:
        """Name of the label column on disk: gold_sim, margin, similarity, or values beside indices; None where nothing labels."""
        return LABEL_COLUMNS[self.kind]

    @property
    def counts(self) -> dict[str, Any]:
        """Pairs, rows, rows dropped by reason, and the mining counts."""
        return dict(self.artifact.manifest["counts"])

    @property
    def summary(self) -> dict[str, Any]:
        """Figures of the labels that catch a broken teacher; which ones depends on the kind."""
        return dict(self.artifact.manifest["summary"])

    def __len__(self) -> int:
        return sum(self.artifact.manifest["shards"].values())

    def labels(self) -> NDArray[np.float32]:
        """Return float32 [R, W]: all labels; W is N scores, N−1 margins, 1 similarity. ValueError for other kinds."""
        if self.kind in ("none", "embedding"):
            raise ValueError(f"{self.artifact.folder}: a table of kind {self.kind!r} has no matrix of labels")
        column = str(self.label_column)
        return np.concatenate([matrix_of(read_shard(path, self.artifact), column) for path in self.shard_paths])

    def vectors(self) -> scipy.sparse.csr_matrix:
        """Return float32 CSR [R, V]: the teacher's vectors, in order. ValueError unless the kind is embedding."""
        import scipy.sparse

        if self.kind != "embedding":
            raise ValueError(f"{self.artifact.folder}: a table of kind {self.kind!r} has no vectors")
        tables = [read_shard(path, self.artifact) for path in self.shard_paths]
        columns = {name: [table[name].combine_chunks() for table in tables] for name in ("indices", "values")}
        lengths = np.concatenate([np.diff(part.offsets.to_numpy()) for part in columns["indices"]])
        starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        indices, values = (
            np.concatenate([part.flatten().to_numpy() for part in columns[name]]) for name in ("indices", "values")
        )
        return scipy.sparse.csr_matrix((values, indices, starts), shape=(len(self), self.contract.dimension))

    def rows(self) -> Iterator[tuple[str, list[str], list[float]]]:
        """Yield (query_id, passage_ids, labels), in order; no labels for kind none. ValueError for embedding, see ``texts``."""
        if self.kind == "embedding":
            raise ValueError(f"{self.artifact.folder}: a table of kind 'embedding' holds texts, not rows of passages")
        for path in self.shard_paths:
            for batch in read_shard(path, self.artifact).to_batches(max_chunksize=1024):
                columns = [batch.column(place).to_pylist() for place in range(batch.num_columns)]
                labels = columns[2] if len(columns) > 2 else [[] for _ in columns[0]]
                wrapped = [[label] for label in labels] if self.kind == "similarity" else labels
                yield from zip(columns[0], columns[1], wrapped, strict=True)

    def texts(self) -> dict[Role, list[str]]:
        """Return the ids of every text by role, each once, in the order of first use."""
        ids: dict[Role, dict[str, None]] = {"query": {}, "passage": {}}
        for path in self.shard_paths:
            table = read_shard(path, self.artifact)
            if self.kind == "embedding":
                for role, text_id in zip(table["role"].to_pylist(), table["text_id"].to_pylist(), strict=True):
                    ids[cast(Role, role)][text_id] = None
            else:
                ids["query"].update(dict.fromkeys(table["query_id"].to_pylist()))
                ids["passage"].update(dict.fromkeys(table["passage_ids"].combine_chunks().flatten().to_pylist()))
        return {role: list(found) for role, found in ids.items()}


def check_for_loss(table: ScoreTable, losses: Iterable[str]) -> None:
    """Raise ValueError, with the valid choices, unless the main losses, together, can learn from the table.

    Each labelled loss needs its kind: KL whole score lists, since a softmax over margins leaves the positive out. MarginMSE knows
    scores from margins only by width, which ``ScoreTable.open`` has verified, so the trainer must pass exactly ``num_passages``
    texts. Losses over passages alone may stand beside a labelled one, never alone on labels that they would ignore.
    SparseMSELoss stands alone. A loss of one's own, ``module:Class``, takes any kind.
    """
    names = list(losses)
    for name in names:
        _check_loss(table, name)
    known = [name for name in names if ":" not in name]
    if "SparseMSELoss" in names and len(names) > 1:
        other = next(name for name in names if name != "SparseMSELoss")
        raise ValueError(
            f"[training] loss: SparseMSELoss beside {other}: its labels are vectors, which no other loss can read; name it alone"
        )
    if table.kind != "none" and names == known and all(name in _WITHOUT_LABELS for name in names):
        raise ValueError(
            f"[training] loss = {names[0]!r} would ignore the labels of {table.artifact.folder} "
            f'({_found(table)}); set [labels] kind = "none" (asks no teacher), or name one of {list(_BY_KIND[table.kind])} too'
        )
    if "SparseTripletLoss" in names and table.num_passages != 2:
        raise ValueError(
            f"[training] loss = 'SparseTripletLoss' needs a positive and one negative per row, but {table.artifact.folder} holds "
            f'{_found(table)}; set [labels] layout = "triplets" (no teacher call) or num_negatives = 1'
        )


def _check_loss(table: ScoreTable, name: str) -> None:
    if ":" in name:
        return
    kinds = [kind for kind, names in _BY_KIND.items() if name in names]
    if not kinds:
        known = sorted({name for names in _BY_KIND.values() for name in names})
        raise ValueError(f"[training] loss = {name!r} is not a loss over score tables; expected one of {known}, or module:Class")
    takes_passages = name in _WITHOUT_LABELS and table.kind in ("score_list", "margin")
    if table.kind not in kinds and not takes_passages:
        wanted = " or ".join(f'[labels] kind = "{kind}"' for kind in kinds)
        num_passages = table.num_passages if table.num_passages > 1 else "N"
        needs = " or ".join(_TAKES[kind].format(n=num_passages, m="N−1") for kind in kinds)
        valid = " or ".join(f'"{choice}"' for choice in _BY_KIND[table.kind])
        raise ValueError(
            f'[training] loss = "{name}" needs {needs}, but {table.artifact.folder} holds {_found(table)}; set {wanted}, '
            f"or choose loss = {valid}"
        )


def _found(table: ScoreTable) -> str:
    return _TAKES[table.kind].format(n=table.num_passages, m=table.num_passages - 1)
