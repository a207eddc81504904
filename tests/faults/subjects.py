"""What each stage writes, small: how it is written, and how it is read back as the old state or the new one.

The writers and readers are the stages' own. Rows are drawn from fixed numbers, so two roots hold the same bytes.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from sparsekd.artifact import find, naming, publish, read_manifest, verify, write_json_atomically
from sparsekd.bank import EmbeddingBank, ScoreBank, text_keys
from sparsekd.evaluation.runs import Ranking, read_trec_run, write_trec_run
from sparsekd.exchange.target import exported
from sparsekd.labels import score_table
from sparsekd.labels.contract import Contract, table_schema
from sparsekd.mining import candidates
from sparsekd.mining.shards import write_shards

FIELDS: dict[str, Any] = {"stage": 1, "input": {"digest": "00ff"}}
NUM_ROWS = 60
OLD, NEW = "old", "new"


class Subject(ABC):
    """Something under ``root`` that is written in one go."""

    stage: ClassVar[str]

    def __init__(self, root: Path, name: str = "") -> None:
        """``name`` tells two experiments over one bank apart: it is a part of what their models are known by."""
        self.root, self.name = root, name

    def prepare(self) -> None:
        """Make the old state."""
        self.root.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def write(self) -> None:
        """Make the new state of the old one."""

    @abstractmethod
    def state(self) -> str:
        """Return which state a reader finds, every byte read; what the reader raises, if it refuses."""

    @property
    @abstractmethod
    def shards(self) -> Sequence[Path]:
        """The files that hold the rows."""


class Published(Subject):
    """An artifact: absent, or as it was published."""

    kind: ClassVar[str]

    @property
    def folder(self) -> Path:
        return self.root / self.kind / "key"

    def write(self) -> None:
        if find(self.folder, FIELDS) is not None:
            return
        extra: dict[str, Any] = {"counts": {"rows": NUM_ROWS}, "summary": {}, "command": "python stage.py recipe.toml"}
        with publish(self.folder, kind=self.kind, fields=FIELDS, extra=extra) as temporary:
            self.fill(temporary, extra)

    def state(self) -> str:
        found = find(self.folder, FIELDS)
        if found is None:
            return OLD
        verify(found)
        assert found.manifest["counts"] == {"rows": NUM_ROWS}
        self.check(self.folder)
        return NEW

    @property
    def shards(self) -> Sequence[Path]:
        return sorted(self.folder.glob("*.arrow"))

    @abstractmethod
    def fill(self, folder: Path, extra: dict[str, Any]) -> None:
        """Write the files."""

    @abstractmethod
    def check(self, folder: Path) -> None:
        """Read them; AssertionError if they are not the same."""


class CandidatesSubject(Published):
    """Candidates in two shards."""

    stage = "mine"
    kind = candidates.KIND

    def fill(self, folder: Path, extra: dict[str, Any]) -> None:
        tables = [pa.Table.from_pylist(part, schema=candidates.SCHEMA) for part in halves(self.rows())]
        extra["shards"] = write_shards(folder, self.kind, tables, 2)

    def check(self, folder: Path) -> None:
        assert [vars(row) for row in candidates.Candidates.open(folder)] == self.rows()

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "query_id": f"q{row}",
                "positive_ids": [f"p{row}"],
                "passage_ids": [f"n{row}", f"m{row}"],
                "miner": ["bm25", "bm25"],
                "miner_score": [row + 0.5, row + 0.25],
                "rank": [1, 2],
            }
            for row in range(NUM_ROWS)
        ]


class TableSubject(Published):
    """A score table in two shards."""

    stage = "table"
    kind = score_table.KIND
    contract = Contract(num_passages=3, teachers=({"identity": "a", "weight": 1.0},), calibration={"kind": "raw"})

    def fill(self, folder: Path, extra: dict[str, Any]) -> None:
        schema = table_schema("score_list", self.contract)
        names = ("query_id", "passage_ids", "gold_sim")
        rows = [dict(zip(names, row, strict=True)) for row in self.rows()]
        extra["shards"] = write_shards(folder, self.kind, [pa.Table.from_pylist(part, schema=schema) for part in halves(rows)], 2)

    def check(self, folder: Path) -> None:
        assert list(score_table.ScoreTable.open(folder).rows()) == self.rows()

    def rows(self) -> list[tuple[str, list[str], list[float]]]:
        return [(f"q{row}", [f"p{row}", f"n{row}", f"m{row}"], [row + 0.5, row + 0.25, 0.0]) for row in range(NUM_ROWS)]


class StudentSubject(Published):
    """A folder of weights and small files, one of them a level deeper."""

    stage = "train"
    kind = "students"
    files: ClassVar = {"model.safetensors": bytes(range(256)) * 20, "config.json": b"{}", "1_SpladePooling/config.json": b"{}\n"}

    def fill(self, folder: Path, extra: dict[str, Any]) -> None:
        for name, content in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)

    def check(self, folder: Path) -> None:
        assert {name: (folder / name).read_bytes() for name in self.files} == self.files


class RunSubject(Published):
    """A ranking and its figures."""

    stage = "evaluate"
    kind = "runs"
    rankings: ClassVar = {f"q{row}": Ranking([f"p{row}", "other"], np.array([2.5, 1.0])) for row in range(NUM_ROWS)}
    figures: ClassVar = {"nDCG@10": 0.6042, "RR@10": 0.5668}

    def fill(self, folder: Path, extra: dict[str, Any]) -> None:
        write_trec_run(folder / "run.trec", self.rankings, "sparsekd")
        write_json_atomically(folder / "metrics.json", self.figures)

    def check(self, folder: Path) -> None:
        found = read_trec_run(folder / "run.trec")
        assert {query_id: list(hits.passage_ids) for query_id, hits in found.items()} == {
            query_id: list(hits.passage_ids) for query_id, hits in self.rankings.items()
        }


class ExportSubject(Subject):
    """An export that replaces an earlier one, which is missing for a moment, never half."""

    stage = "export"
    files: ClassVar = {OLD: b"old\n" * 500, NEW: b"new\n" * 700}

    @property
    def target(self) -> Path:
        return self.root / "out"

    def prepare(self) -> None:
        super().prepare()
        self._export(OLD)

    def write(self) -> None:
        self._export(NEW)

    def _export(self, state: str) -> None:
        with exported(self.target, fields={"state": state}, extra={}, overwrite=True) as folder:
            (folder / "train.jsonl").write_bytes(self.files[state])

    def state(self) -> str:
        if not self.target.exists():
            return "absent"
        state = str(read_manifest(self.target)["fields"]["state"])
        found = find(self.target, {"state": state})
        assert found is not None
        verify(found)
        assert (self.target / "train.jsonl").read_bytes() == self.files[state]
        return state

    @property
    def shards(self) -> Sequence[Path]:
        return [self.target / "train.jsonl"]


class ScoresSubject(Subject):
    """A score bank of three segments, which one more append joins into one."""

    stage = "score"
    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "dense", "weights": {"model.safetensors": f"00ff{self.name}"}}

    def prepare(self) -> None:
        super().prepare()
        self._append(np.arange(300), max_segment_pairs=100)  # full segments are not merged by who wrote them

    def write(self) -> None:
        self._append_missing(np.arange(300, 360))

    rows_per_segment = 100

    def refill(self) -> int:
        """Append what is missing of the old state, and return how much that was."""
        return self._append_missing(np.arange(300), max_segment_pairs=100)

    def _append_missing(self, numbers: Any, **settings: int) -> int:
        missing = numbers[np.isnan(ScoreBank(self.root / "bank").open(self.identity).lookup(*self._pairs(numbers)))]
        self._append(missing, **settings)
        return len(missing)

    def state(self) -> str:
        numbers = np.arange(360)
        found = ScoreBank(self.root / "bank").open(self.identity).lookup(*self._pairs(numbers))
        known = 360 if not np.isnan(found[-1]) else 300
        np.testing.assert_array_equal(found, np.where(numbers < known, numbers, np.nan).astype(np.float32))
        return NEW if known == 360 else OLD

    @property
    def folder(self) -> Path:
        return ScoreBank(self.root / "bank").open(self.identity).folder

    @property
    def shards(self) -> Sequence[Path]:
        return sorted(self.folder.glob("*.arrow"))

    def _append(self, numbers: Any, **settings: int) -> None:
        if len(numbers):
            scores = ScoreBank(self.root / "bank", **settings).open(self.identity, reference="tiny")
            scores.append(*self._pairs(numbers), numbers.astype(np.float32))

    def _pairs(self, numbers: Any) -> tuple[Any, Any]:
        return text_keys(f"query {number // 20}" for number in numbers), text_keys(f"passage {number}" for number in numbers)


class EmbeddingsSubject(Subject):
    """An embedding bank of two segments, which one more append joins into one."""

    stage = "embed"
    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "encoder", "weights": {"model.safetensors": f"00ff{self.name}"}}

    def prepare(self) -> None:
        super().prepare()
        for start in (0, 20):
            self._append(np.arange(start, start + 20), max_segment_bytes=1)

    def write(self) -> None:
        self._append_missing(np.arange(40, 60))

    rows_per_segment = 20

    def refill(self) -> int:
        """Append what is missing of the old state, and return how much that was."""
        return self._append_missing(np.arange(40), max_segment_bytes=1)

    def _append_missing(self, numbers: Any, **settings: int) -> int:
        missing = numbers[~EmbeddingBank(self.root / "bank").open(self.identity).known(self._keys(numbers))]
        self._append(missing, **settings)
        return len(missing)

    def state(self) -> str:
        numbers = np.arange(60)
        found, vectors = EmbeddingBank(self.root / "bank").open(self.identity).lookup(self._keys(numbers))
        known = 60 if found[-1] else 40
        np.testing.assert_array_equal(found, numbers < known)
        np.testing.assert_array_equal(vectors, self._vectors(numbers[:known]))
        return NEW if known == 60 else OLD

    @property
    def folder(self) -> Path:
        return EmbeddingBank(self.root / "bank").open(self.identity).folder

    @property
    def shards(self) -> Sequence[Path]:
        return sorted(self.folder.glob("*.arrow"))

    def _append(self, numbers: Any, **settings: int) -> None:
        if len(numbers):
            bank = EmbeddingBank(self.root / "bank", **settings).open(self.identity, reference="tiny")
            bank.append(self._keys(numbers), self._vectors(numbers))

    def _keys(self, numbers: Any) -> Any:
        return text_keys(f"text {number}" for number in numbers)

    def _vectors(self, numbers: Any) -> Any:
        return np.asarray(numbers, dtype=np.float32)[:, None] * np.arange(1, 9, dtype=np.float32)


class CheckpointSubject(Subject):
    """A second checkpoint beside a sealed first one; the trainer writes its files as they come, then they are sealed."""

    stage = "checkpoint"
    fields: ClassVar = {"table": "abc", "training": {"seed": 1}}
    files: ClassVar = {
        "model.safetensors": bytes(range(256)) * 8,
        "optimizer.pt": b"optimizer" * 100,
        "rng_state.pth": b"rng" * 50,
        "scheduler.pt": b"scheduler",
        "trainer_state.json": b'{"global_step": 4}',
        "1_SpladePooling/config.json": b"{}",
    }

    def prepare(self) -> None:
        super().prepare()
        self._save(2)

    def write(self) -> None:
        self._save(4)

    def state(self) -> str:
        from sparsekd.training.checkpoints import newest_whole_checkpoint

        found = newest_whole_checkpoint(self.root, "key", self.fields)
        assert found is not None, "both checkpoints are gone"
        assert {name: (found / name).read_bytes() for name in self.files} == self.files
        return {"checkpoint-2": OLD, "checkpoint-4": NEW}[found.name]

    @property
    def shards(self) -> Sequence[Path]:
        return sorted(path for path in (self.root / "checkpoint-4").rglob("*") if path.is_file())

    def _save(self, step: int) -> None:
        from sparsekd.training.checkpoints import seal

        folder = self.root / f"checkpoint-{step}"
        shutil.rmtree(folder, ignore_errors=True)
        with naming(self.root):  # as around the trainer
            for name, content in self.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with (folder / name).open("wb") as stream:
                    stream.write(content)
        seal(folder, "key", self.fields)


def halves(rows: list[Any]) -> list[list[Any]]:
    return [rows[: len(rows) // 2], rows[len(rows) // 2 :]]


SUBJECTS: dict[str, type[Subject]] = {
    subject.stage: subject
    for subject in (
        CandidatesSubject,
        EmbeddingsSubject,
        ScoresSubject,
        TableSubject,
        StudentSubject,
        CheckpointSubject,
        RunSubject,
        ExportSubject,
    )
}
