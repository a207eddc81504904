"""What a recipe will make, said before anything is loaded: each artifact's key, hit or miss, why, and what it costs.

Keys chain: candidates -> score table -> student -> evaluation. Nothing here imports torch; the cost is hashing the collection's
files and the models' weights, about a second a gigabyte; a bm25 teacher's key is made of passages, so its recipe reads them first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsekd.artifact import Artifact, find, key_of
from sparsekd.bank.scores import ScoreBank
from sparsekd.collection.beir import Collection, collection_digest, read_collection
from sparsekd.labels.building import incomplete_teachers, table_fields
from sparsekd.mining.candidates import COLLECTION_FILES, candidates_fields, has_identity
from sparsekd.mining.run_file import run_identity
from sparsekd.recipe import BM25Teacher, DenseMiner, FileTeacher, Miner, Recipe, RunMiner, SparseMiner, Teacher
from sparsekd.students.identity import needs_passages, student_fields, training_fields
from sparsekd.teachers.identity import bm25_identity, encoder_identity, file_identity, sparse_identity, teacher_identity

EVALUATION_VERSION = 1
"""Raised when the same fields would give other rankings or figures."""


@dataclass(frozen=True)
class Plan:
    """The keys and folders of everything a recipe makes."""

    recipe: Recipe
    overrides: tuple[str, ...] = field(default=())

    @property
    def cache(self) -> Path:
        """Where everything is kept."""
        return Path(self.recipe.run.cache)

    @property
    def collection_folder(self) -> Path:
        """The BEIR folder."""
        return Path(self.recipe.collection.path)

    @cached_property
    def collection(self) -> Collection:
        """The passages, queries and qrels the recipe asks for, read when first asked for."""
        section = self.recipe.collection
        return read_collection(
            self.collection_folder, max_passages=section.max_passages, max_train_queries=section.max_train_queries
        )

    def member(self, recipe: Recipe, overrides: Sequence[str]) -> Plan:
        """Return the plan of a recipe with the same [collection], which is read once for both."""
        plan = Plan(recipe, (*self.overrides, *overrides))
        vars(plan)["collection"] = self.collection  # where cached_property would keep it
        return plan

    @cached_property
    def teacher_identities(self) -> dict[str, dict[str, Any]]:
        """Identity by teacher name."""
        return {teacher.name: self._teacher_identity(teacher) for teacher in self.recipe.teachers}

    def _teacher_identity(self, teacher: Teacher | BM25Teacher | FileTeacher) -> dict[str, Any]:
        if isinstance(teacher, FileTeacher):
            return file_identity(teacher.imported, teacher.fields)
        if isinstance(teacher, BM25Teacher):
            return bm25_identity(teacher, self.collection.passages.values())
        return teacher_identity(teacher)

    @cached_property
    def candidates_fields(self) -> dict[str, Any]:
        """What decides the candidates."""
        digest = collection_digest(self.collection_folder, COLLECTION_FILES)
        identities = [_miner_identity(miner) for miner in self.recipe.mining.asked if has_identity(miner)]
        return candidates_fields(self.recipe, digest, identities)

    @cached_property
    def table_fields(self) -> dict[str, Any]:
        """What decides the score table."""
        fields = table_fields(self.recipe, key_of(self.candidates_fields), self.teacher_identities)
        incomplete = incomplete_teachers(self.recipe)
        if incomplete:  # a later import fills gaps that other teachers' scores fill now
            identities, bank = [self.teacher_identities[name] for name in incomplete], ScoreBank(self.cache / "bank")
            fields["imported"] = {key_of(identity): bank.open(identity).content for identity in identities}
        return fields

    @cached_property
    def untrained_fields(self) -> dict[str, Any]:
        """What decides the untrained student: its weights, its architecture, and the passages that parts of it start from."""
        fields = student_fields(self.recipe.student)
        if needs_passages(self.recipe.student):
            fields["passages"] = self._passages_fields
        return fields

    @cached_property
    def student_fields(self) -> dict[str, Any]:
        """What decides the trained student."""
        fields = training_fields(self.recipe, key_of(self.table_fields), self.untrained_fields)
        if self.recipe.training.dev_steps is not None:
            judged = collection_digest(self.collection_folder, ["queries.jsonl", "qrels/dev.tsv"])
            fields["dev"] = {**judged, **self._passages_fields}
        return fields

    @cached_property
    def _passages_fields(self) -> dict[str, Any]:
        digest = collection_digest(self.collection_folder, ["corpus.jsonl"])
        return {"corpus": digest["corpus.jsonl"], "max_passages": self.recipe.collection.max_passages}

    def system_fields(self) -> dict[str, dict[str, Any]]:
        """Return what decides each measured system's ranking, by system name, in the order they are reported.

        A teacher of kind "file" is none: it knows the pairs that were imported and cannot rank others.
        """
        evaluation = self.recipe.evaluation
        split = f"qrels/{evaluation.split}.tsv"
        digest = collection_digest(self.collection_folder, ["queries.jsonl", split])
        common = {
            "version": EVALUATION_VERSION,
            "split": evaluation.split,
            "queries": digest["queries.jsonl"],
            "qrels": digest[split],
            **self._passages_fields,
        }
        bm25 = {"k1": evaluation.k1, "b": evaluation.b}
        systems: dict[str, dict[str, Any]] = {"bm25": {"system": "bm25", **bm25}}
        for teacher in self.recipe.teachers:
            if isinstance(teacher, FileTeacher):
                continue
            if isinstance(teacher, BM25Teacher):  # the baseline's own key where k1 and b are the same: ranked once
                systems[f"teacher:{teacher.name}"] = {"system": "bm25", "k1": teacher.k1, "b": teacher.b}
                continue
            system: dict[str, Any] = {"system": teacher.kind, "identity": self.teacher_identities[teacher.name]}
            if teacher.kind == "cross-encoder":
                system |= {**bm25, "rerank_depth": evaluation.rerank_depth}
            systems[f"teacher:{teacher.name}"] = system
        systems["student:untrained"] = {"system": "student", "untrained": self.untrained_fields}
        systems["student"] = {"system": "student", "trained": key_of(self.student_fields)}
        return {name: {**common, **fields} for name, fields in systems.items()}

    def folder(self, kind: str, fields: Mapping[str, Any]) -> Path:
        """Return where the artifact of ``kind`` made from ``fields`` is, or will be."""
        return self.cache / kind / key_of(fields)

    def hit(self, kind: str, fields: Mapping[str, Any]) -> Artifact | None:
        """Return the finished artifact, None if it has to be made; IntegrityError if it is damaged."""
        return find(self.folder(kind, fields), fields)

    def evaluation_fields(self) -> dict[str, Any]:
        """What decides the evaluation: every system's key."""
        return {"version": EVALUATION_VERSION, "systems": {name: key_of(f) for name, f in self.system_fields().items()}}

    def artifacts(self, kinds: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
        """Return (kind, fields) of the artifacts of ``kinds``, in the order of work."""
        fields = {
            "candidates": lambda: self.candidates_fields,
            "tables": lambda: self.table_fields,
            "students": lambda: self.student_fields,
            "evaluations": self.evaluation_fields,
        }
        return [(kind, fields[kind]()) for kind in kinds]


def _miner_identity(miner: Miner) -> dict[str, Any]:
    """What decides the vectors or lines of a miner that reads a model or a file."""
    if isinstance(miner, RunMiner):
        return dict(run_identity(miner.path))
    if isinstance(miner, SparseMiner):
        return sparse_identity(miner)
    assert isinstance(miner, DenseMiner), miner.kind
    return encoder_identity(miner)
