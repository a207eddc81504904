"""What a plan will need, said before work starts: peak memory of a process and growth of the cache, by artifact.

Upper estimates: what is held (libraries, collection) plus the largest of the phases that follow one another. Bytes per text,
posting, pair and token were measured (docs/reliability.md has estimates beside peaks at one and ten times the size). A model whose
size cannot be read, such as the student of a round before, is left out and named. Imports no torch.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsekd.collection.beir import Collection
from sparsekd.labels.building import scored_teachers
from sparsekd.mining.shards import ROWS_PER_SHARD
from sparsekd.model_reference import resolve
from sparsekd.plan import Plan
from sparsekd.recipe import (
    BM25Miner,
    BM25Teacher,
    DenseMiner,
    FileTeacher,
    Miner,
    SparseMiner,
    Teacher,
)

_LIBRARIES = 760_000_000  # torch, transformers, sentence-transformers, FAISS, pandas
_ENTRY = 600  # of a passage, query or judgement beside its text: ids, dicts
_BM25 = 60_000_000, 5.0  # bm25s and scipy; bytes for each of the passages' texts
_KEY = 100  # of a text that is encoded or a pair that is scored: content keys, order, gold_sim
_PAIR = 350  # of a pair: its two ids as Python strings, in lists
_CANDIDATE = 400  # of a candidate while its row is written
_TEXT_TOKENS = 4  # bytes for each of a text's characters: token ids, kept until its shard is committed
_ACTIVE_DIMS = 256  # of a sparse vector, when nobody says
_ID = 20
_RANKED = 100, 120  # passages of a query in a system's ranking; bytes for each, in its own run file and in the evaluation's
_COPIES_ON_DISK = 1 + 3 * 3  # weights as published, and three checkpoints with AdamW's two moments while one replaces another


@dataclass(frozen=True)
class Need:
    """What making one artifact takes."""

    kind: str
    memory: int
    """Bytes of resident memory at the peak, of each process."""
    disk: int
    """Bytes by which the cache grows at most."""
    largest: str
    """What most of the memory beyond libraries and collection is for."""
    remedy: str
    """What makes that smaller."""
    unknown: tuple[str, ...]
    """Models that are not here yet and so are not counted."""


@dataclass(frozen=True)
class _Model:
    """What a model's files say of its size."""

    weights: int
    """Bytes in float32."""
    width: int
    layers: int
    inner: int
    vocabulary: int

    def forward(self, tokens: int) -> int:
        """Bytes of one forward pass without gradients."""
        return 4 * tokens * (10 * self.width + 2 * self.inner)

    def step(self, tokens: int) -> int:
        """Bytes of what a training step keeps for its gradients."""
        return 4 * tokens * self.layers * (8 * self.width + 3 * self.inner)


@dataclass(frozen=True)
class _Phase:
    what: str
    memory: int
    remedy: str


def needs_of(plan: Plan, kinds: Sequence[str]) -> list[Need]:
    """Return the needs of those of ``kinds`` that are missing, of the last round; reads the collection if there is one."""
    missing = [kind for kind, fields in plan.artifacts(kinds) if plan.hit(kind, fields) is None]
    counted = _Counted(plan)
    makers = {"candidates": counted.candidates, "tables": counted.tables, "students": counted.students}
    makers |= {"evaluations": counted.evaluations, "teachers": counted.teachers}
    return [makers[kind]() for kind in missing if kind in makers]


def require(plan: Plan, kinds: Sequence[str]) -> None:
    """Raise ValueError, before anything is made, if what is missing of ``kinds`` cannot fit into memory or on the disk."""
    needs, limit = needs_of(plan, kinds), memory_limit(plan)
    workers = plan.recipe.run.workers if plan.recipe.run.runner == "local" else 1
    for need in needs:
        processes = workers if need.kind in ("candidates", "tables") else 1
        if limit is not None and processes * need.memory > limit:
            times = f"{processes} workers need" if processes > 1 else "it needs"
            raise ValueError(
                f"[run] {need.kind}: {times} up to {_shown(processes * need.memory)} of memory, {_shown(limit)} are there; most is "
                f"for {need.largest}: {need.remedy}; or say what may be used with --set run.memory_gb=..."
            )
    free, wanted = free_disk(plan.cache), sum(need.disk for need in needs)
    if wanted > free:
        raise ValueError(
            f"[run] cache = {plan.recipe.run.cache!r}: {', '.join(need.kind for need in needs)} need up to {_shown(wanted)} on "
            f"this disk, {_shown(free)} are free; make room or name another cache"
        )


def describe_needs(plan: Plan, kinds: Sequence[str]) -> list[str]:
    """Return the plan's lines on memory and disk, none where nothing is missing."""
    needs = needs_of(plan, kinds)
    if not needs:
        return []
    limit = memory_limit(plan)
    lines = []
    for need in needs:
        not_counted = f"; of unknown size, so not counted: {', '.join(need.unknown)}" if need.unknown else ""
        memory, disk = _shown(need.memory), _shown(need.disk)
        lines.append(f"needs        {need.kind}: memory up to {memory}, most for {need.largest}; disk up to {disk}{not_counted}")
    there = "an amount that this system does not tell" if limit is None else _shown(limit)
    return [*lines, f"there are {there} of memory and {_shown(free_disk(plan.cache))} of disk"]


def memory_limit(plan: Plan) -> int | None:
    """Return the bytes of memory that processes may use: as the recipe says, else what the machine or its control group has."""
    asked = plan.recipe.run.memory_gb
    if asked is not None:
        return round(asked * 1e9)
    limits = [control_group_limit(Path("/sys/fs/cgroup/memory.max")), machine_memory(Path("/proc/meminfo"))]
    return min((limit for limit in limits if limit is not None), default=None)


def free_disk(cache: Path) -> int:
    """Return the bytes that are free where the cache is, or will be."""
    place = cache.absolute()
    return shutil.disk_usage(next(each for each in (place, *place.parents) if each.exists())).free


def control_group_limit(path: Path) -> int | None:
    """Return the bytes that a control group's ``memory.max`` allows; None if it has no limit, or is not there."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no control groups, or "max"
        return None


def machine_memory(path: Path) -> int | None:
    """Return the bytes of memory that ``/proc/meminfo`` tells of, None where there is none."""
    try:
        line = path.read_text(encoding="ascii").splitlines()[0]  # MemTotal:       24690480 kB
        return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None


def _shown(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


class _Counted:
    """A plan's collection and models, counted once."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._recipe = plan.recipe
        self._run = plan.recipe.run
        self._models: dict[str, _Model | None] = {}

    def candidates(self) -> Need:
        asked = self._plan.mined_recipe.mining.asked
        num_queries, num_passages = self._num_train_queries, self._num_passages
        found = sum(8 * num_queries * min(miner.depth, num_passages) for miner in asked)
        rows = min(num_queries, ROWS_PER_SHARD) * self._quota * _CANDIDATE
        phases = [self._mined(miner) for miner in asked]
        phases.append(_Phase("what miners found, and the candidates' rows", 2 * found + rows, "lower depth or quota of the miners"))
        vectors = sum(self._banked_vectors(miner) for miner in asked)
        disk = found + vectors + num_queries * self._quota * (_ID + 16)
        return self._need("candidates", phases, disk, self._references(asked))

    def tables(self) -> Need:
        labels, scored = self._recipe.labels, scored_teachers(self._recipe)
        teachers = [each for each in self._plan.teachers if each.name in scored]
        num_pairs = self._num_positives + self._num_train_queries * self._quota
        ids = num_pairs * (_PAIR + _KEY)
        fewer = "lower the miners' quotas or collection.max_train_queries"
        phases = [_Phase("ids of pairs", ids, fewer)]
        for teacher in teachers:
            if isinstance(teacher, BM25Teacher):
                phases.append(_Phase(f"teacher {teacher.name}'s index", ids + self._bm25, "lower collection.max_passages"))
            elif not isinstance(teacher, FileTeacher):
                running = self._running(getattr(teacher, "model", None))
                texts = self._read + _KEY * (self._num_passages + self._num_train_queries)
                phases.append(_Phase(f"teacher {teacher.name} and its texts", ids + running + texts, "lower run.batch_tokens"))
        rows = min(self._num_positives, ROWS_PER_SHARD) * (labels.num_negatives + 1) * _CANDIDATE
        phases.append(_Phase("the table's rows", ids + rows, fewer))
        disk = 24 * num_pairs * len(teachers) + self._num_positives * (labels.num_negatives + 1) * (_ID + 8)
        return self._need("tables", phases, disk, self._references(teachers))

    def students(self) -> Need:
        student, training = self._recipe.student, self._recipe.training
        model = self._model(student.model)
        phases = [_Phase("BM25 over the passages", self._bm25, "leave training.dev_steps out")] if training.dev_steps else []
        disk = 0
        if model is not None:
            texts = training.batch_size * (self._recipe.labels.num_negatives + 2)
            tokens = (training.mini_batch_size or texts) * student.max_length
            dims = model.vocabulary if student.kind == "splade" else student.hidden_dim or 4 * model.width
            head = 4 * (3 * tokens * dims if not self._run.fused_head else 0) + 16 * texts * dims
            copies = (5 if training.dev_steps else 4) * model.weights  # weights, gradients, AdamW's two moments; the best so far
            smaller = "lower training.batch_size or student.max_length, or set training.mini_batch_size"
            phases.append(_Phase("weights, optimizer and one step's texts", copies + model.step(tokens) + head, smaller))
            disk = model.weights * _COPIES_ON_DISK
        return self._need("students", phases, disk, (student.model,))

    def teachers(self) -> Need:
        section = self._plan.train_teacher
        model = self._model(section.model)
        phases, disk = [_Phase("BM25 over the passages", self._bm25, "lower collection.max_passages")], 0
        if model is not None:
            tokens = section.batch_size * (section.num_negatives + 1) * section.max_length
            smaller = "lower train_teacher.batch_size, num_negatives or max_length"
            phases.append(_Phase("weights, optimizer and one step's pairs", 5 * model.weights + model.step(tokens), smaller))
            disk = model.weights * _COPIES_ON_DISK
        return self._need("teachers", phases, disk, (section.model,))

    def evaluations(self) -> Need:
        student, num_passages = self._recipe.student, self._num_passages
        lower = "lower collection.max_passages"
        postings = 8 * num_passages * (student.k if student.kind == "csr" else _ACTIVE_DIMS)
        phases = [_Phase("BM25 over the passages", self._bm25, lower)]
        phases.append(_Phase("the student and its index", 2 * postings + self._running(student.model) + self._read, lower))
        disk = 0
        for teacher in self._plan.teachers:
            if isinstance(teacher, Teacher):
                running = self._running(teacher.model) + self._vectors(teacher.model, num_passages, copies=3)
                phases.append(_Phase(f"teacher {teacher.name} and its vectors", running + self._read, lower))
                disk += self._vectors(teacher.model, num_passages) if teacher.kind == "dense" else 0
        split = len(self._collection.qrels.get(self._recipe.evaluation.split, {}))
        ranked, each = _RANKED
        disk += (len(self._recipe.teachers) + 3) * split * min(ranked, num_passages) * each
        return self._need("evaluations", phases, disk, (student.model, *self._references(self._plan.teachers)))

    def _mined(self, miner: Miner) -> _Phase:
        num_queries, passages = self._num_train_queries, min(self._num_passages, self._run.shard_passages)
        answers = 12 * min(num_queries, 1024) * (miner.depth + 64) + 8 * num_queries * miner.depth
        if isinstance(miner, BM25Miner):
            return _Phase("BM25's postings", self._bm25 + answers, "lower collection.max_passages")
        if isinstance(miner, DenseMiner):
            vectors = self._vectors(miner.model, passages, copies=3) + self._vectors(miner.model, num_queries, copies=2)
            if miner.index != "flat":
                vectors += 2 * self._vectors(miner.model, self._num_passages)
            running = self._running(miner.model) + passages * _KEY + self._read
            smaller = "lower run.shard_passages or run.batch_tokens"
            return _Phase(f"{miner.kind} miner's vectors", vectors + running + answers, smaller)
        if isinstance(miner, SparseMiner):
            postings = 8 * _ACTIVE_DIMS * (3 * passages + 2 * num_queries)
            running = self._running(miner.model) + passages * _KEY + self._read
            return _Phase(f"{miner.kind} miner's vectors", postings + running + answers, "lower run.shard_passages")
        return _Phase(f"{miner.kind} miner's lists", answers + (_CANDIDATE * num_queries * miner.depth), "lower its depth")

    def _need(self, kind: str, phases: Sequence[_Phase], disk: int, references: Sequence[str]) -> Need:
        largest = max(phases, key=lambda phase: phase.memory, default=_Phase("the collection", 0, "lower collection.max_passages"))
        unknown = tuple(each for each in dict.fromkeys(references) if self._model(each) is None)
        return Need(kind, _LIBRARIES + self._held + largest.memory, disk, largest.what, largest.remedy, unknown)

    @cached_property
    def _collection(self) -> Collection:
        return self._plan.collection

    @property
    def _num_passages(self) -> int:
        return len(self._collection.passages)

    @cached_property
    def _num_train_queries(self) -> int:
        return len(self._collection.qrels.get("train", {}))

    @cached_property
    def _num_positives(self) -> int:
        limit = self._recipe.mining.max_positives
        judged = self._collection.qrels.get("train", {}).values()
        positives = (sum(grade >= 1 for grade in grades.values()) for grades in judged)
        return sum(number if limit is None else min(number, limit) for number in positives)

    @property
    def _quota(self) -> int:
        return sum(miner.quota for miner in self._plan.mined_recipe.mining.asked)

    @cached_property
    def _text_bytes(self) -> int:
        return sum(map(sys.getsizeof, self._collection.passages.values()))

    @cached_property
    def _held(self) -> int:
        queries = sum(map(sys.getsizeof, self._collection.queries.values()))
        judged = sum(len(grades) for split in self._collection.qrels.values() for grades in split.values())
        return self._text_bytes + queries + _ENTRY * (self._num_passages + len(self._collection.queries) + judged)

    @property
    def _bm25(self) -> int:
        fixed, per_byte = _BM25
        return fixed + round(per_byte * self._text_bytes)

    @property
    def _read(self) -> int:
        """Tokens of all texts."""
        return _TEXT_TOKENS * self._text_bytes

    def _running(self, reference: str | None) -> int:
        model = None if reference is None else self._model(reference)
        return 0 if model is None else model.weights + model.forward(self._run.batch_tokens)

    def _vectors(self, reference: str, number: int, *, copies: int = 1) -> int:
        model = self._model(reference)
        return 0 if model is None else copies * number * (4 * model.width + 40)

    def _banked_vectors(self, miner: Miner) -> int:
        num_texts = self._num_passages + self._num_train_queries
        if isinstance(miner, DenseMiner):
            return self._vectors(miner.model, num_texts)
        return 8 * _ACTIVE_DIMS * num_texts if isinstance(miner, SparseMiner) else 0

    def _references(self, users: Sequence[Any]) -> tuple[str, ...]:
        return tuple(each.model for each in users if hasattr(each, "model"))

    def _model(self, reference: str) -> _Model | None:
        if reference not in self._models:
            self._models[reference] = _read_model(reference)
        return self._models[reference]


def _read_model(reference: str) -> _Model | None:
    """Return what a model's folder says; None if it is not here, or says nothing."""
    try:
        folder = resolve(reference).path
    except FileNotFoundError:  # the student of a round before, which is not trained yet
        return None
    for path in _configurations(folder):
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            continue
        width = config.get("hidden_size") or config.get("d_model") or config.get("dim")
        if not isinstance(width, int):
            continue
        weights = sum(each.stat().st_size for each in path.parent.glob("*.safetensors"))
        halved = config.get("dtype", config.get("torch_dtype")) in ("float16", "bfloat16")
        layers = config.get("num_hidden_layers") or config.get("num_layers") or config.get("n_layers") or 1
        inner = config.get("intermediate_size") or config.get("d_ff") or config.get("hidden_dim") or 4 * width
        return _Model(weights * (2 if halved else 1), width, int(layers), int(inner), int(config.get("vocab_size", 0)))
    return None


def _configurations(folder: Path) -> Iterator[Path]:
    """Yield the configuration of a plain checkpoint, or of a sentence-transformers folder's modules."""
    yield from (path for path in (folder / "config.json", *sorted(folder.glob("*/config.json"))) if path.is_file())
