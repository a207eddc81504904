"""What a recipe will make, said before anything is loaded: each artifact's key, hit or miss, why, and what it costs.

Keys chain: candidates -> score table -> student -> evaluation. Of several rounds each has a plan, and its candidates' key holds the
key of the student before. Nothing here imports torch; the cost is hashing the collection's
files and the models' weights, about a second a gigabyte; a bm25 teacher's key is made of passages, so its recipe reads them first.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsekd.artifact import Artifact, differing_fields, find, key_of
from sparsekd.bank.scores import ScoreBank
from sparsekd.bank.sharing import quarantined_items
from sparsekd.collection.beir import Collection, collection_digest, read_collection
from sparsekd.labels.building import incomplete_teachers, scored_teachers, table_fields
from sparsekd.mining.candidates import COLLECTION_FILES, candidates_fields, has_identity
from sparsekd.mining.run_file import run_identity
from sparsekd.recipe import (
    TRAINED,
    AnyTeacher,
    BM25Teacher,
    DenseMiner,
    FileTeacher,
    Miner,
    Recipe,
    RunMiner,
    SparseMiner,
    StudentMiner,
    Teacher,
    TrainTeacher,
)
from sparsekd.students.identity import needs_passages, student_fields, training_fields
from sparsekd.teacher_training.identity import find_trained, trained_teacher_fields
from sparsekd.teachers.identity import bm25_identity, encoder_identity, file_identity, sparse_identity, teacher_identity

logger = logging.getLogger(__name__)

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
    def previous(self) -> Plan | None:
        """The plan of the round before: the same recipe with a round less, and so with the keys that such a recipe has."""
        mining = self.recipe.mining
        if mining.rounds == 1:
            return None
        update = {"rounds": mining.rounds - 1} | ({"student_miner": StudentMiner()} if mining.rounds == 2 else {})
        return replace(self, recipe=self.recipe.model_copy(update={"mining": mining.model_copy(update=update)}))

    @property
    def rounds(self) -> tuple[Plan, ...]:
        """The plans of all rounds, this one last."""
        return (*(() if self.previous is None else self.previous.rounds), self)

    def check_earlier_rounds(self) -> None:
        """Raise ValueError where a round before this one has no student yet, for several processes that train this one's.

        Once processes have met to train a student, only the first can build another, so each round is a run of its own.
        """
        for number, plan in enumerate(self.rounds[:-1], start=1):
            if plan.hit("students", plan.student_fields) is None:
                raise ValueError(
                    f"[mining] rounds = {self.recipe.mining.rounds}: several processes train one student a run, and round "
                    f"{number} has none yet; run the same command first with --set mining.rounds={number}, or all rounds in one "
                    "process"
                )

    @cached_property
    def student_miners(self) -> dict[SparseMiner, str]:
        """The students of the rounds before as miners, and the key of each; their folders need not be there yet."""
        if self.previous is None:
            return {}
        folder, student = self.previous.folder("students", self.previous.student_fields), self.recipe.student
        miner = SparseMiner(
            kind="sparse",
            model=str(folder),
            query_prompt=student.query_prompt,
            passage_prompt=student.passage_prompt,
            **self.recipe.mining.student_miner.model_dump(),
        )
        return {**self.previous.student_miners, miner: folder.name}

    @cached_property
    def mined_recipe(self) -> Recipe:
        """The recipe with everyone who mines in it: its miners, then the students of the rounds before."""
        mining = self.recipe.mining
        miners = (*mining.miners, *self.student_miners)
        return self.recipe.model_copy(update={"mining": mining.model_copy(update={"miners": miners})})

    @cached_property
    def collection(self) -> Collection:
        """The passages, queries and qrels the recipe asks for, read when first asked for."""
        if self.previous is not None:
            return self.previous.collection
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
    def teachers(self) -> tuple[AnyTeacher, ...]:
        """The recipe's teachers, each ``trained:NAME`` replaced by its folder; FileNotFoundError if it was never trained.

        A recipe that trains NAME itself means the cross-encoder of its own settings; where that does not stand, and in every other
        recipe, NAME means the one last made under it.
        """
        return tuple(self._with_folder(teacher) for teacher in self.recipe.teachers)

    def _with_folder(self, teacher: AnyTeacher) -> AnyTeacher:
        if not isinstance(teacher, Teacher) or not teacher.model.startswith(TRAINED):
            return teacher
        section = self.recipe.train_teacher
        is_own = section is not None and teacher.model == TRAINED + section.name
        if is_own and (hit := self.hit("teachers", self.trained_teacher_fields)) is not None:
            return teacher.model_copy(update={"model": str(hit.folder)})
        folder = find_trained(self.cache, teacher.model)
        if is_own:
            logger.warning(
                "teacher %s: %s was trained with other settings, this recipe would train %s: make train-teacher RECIPE=... does",
                teacher.name,
                folder,
                key_of(self.trained_teacher_fields),
            )
        return teacher.model_copy(update={"model": str(folder)})

    @property
    def train_teacher(self) -> TrainTeacher:
        """The section that says how a cross-encoder is fine-tuned; ValueError if the recipe has none."""
        if self.recipe.train_teacher is None:
            raise ValueError(
                "the recipe has no [train_teacher], so there is nothing to train; add the section with a name and a model, "
                "e.g. from pipeline/recipes/domain-adaptation.toml"
            )
        return self.recipe.train_teacher

    @cached_property
    def trained_teacher_fields(self) -> dict[str, Any]:
        """What decides the recipe's own cross-encoder."""
        return trained_teacher_fields(self.train_teacher, key_of(self.candidates_fields), self._dev_fields)

    @cached_property
    def teacher_identities(self) -> dict[str, dict[str, Any]]:
        """Identity by teacher name."""
        if self.previous is not None:
            return self.previous.teacher_identities
        return {teacher.name: self._teacher_identity(teacher) for teacher in self.teachers}

    def _teacher_identity(self, teacher: AnyTeacher) -> dict[str, Any]:
        if isinstance(teacher, FileTeacher):
            return file_identity(teacher.imported, teacher.fields)
        if isinstance(teacher, BM25Teacher):
            return bm25_identity(teacher, self.collection.passages.values())
        return teacher_identity(teacher)

    @cached_property
    def candidates_fields(self) -> dict[str, Any]:
        """What decides the candidates."""
        digest = collection_digest(self.collection_folder, COLLECTION_FILES)
        asked = filter(has_identity, self.mined_recipe.mining.asked)
        return candidates_fields(self.mined_recipe, digest, [self._miner_identity(miner) for miner in asked])

    def _miner_identity(self, miner: Miner) -> dict[str, Any]:
        """What decides the vectors or lines of a miner that reads a model or a file; a student's key does before it is trained."""
        if isinstance(miner, SparseMiner) and miner in self.student_miners:
            return {"student": self.student_miners[miner]}
        if isinstance(miner, RunMiner):
            return dict(run_identity(miner.path))
        if isinstance(miner, SparseMiner):
            return sparse_identity(miner)
        assert isinstance(miner, DenseMiner), miner.kind
        return encoder_identity(miner)

    @cached_property
    def table_fields(self) -> dict[str, Any]:
        """What decides the score table."""
        fields = table_fields(self.recipe, key_of(self.candidates_fields), self.teacher_identities)
        incomplete = incomplete_teachers(self.recipe)
        if incomplete:  # a later import fills gaps that other teachers' scores fill now
            identities, bank = [self.teacher_identities[name] for name in incomplete], ScoreBank(self.cache / "bank")
            fields["imported"] = {key_of(identity): bank.open(identity).content for identity in identities}
        if self.recipe.labels.allow_quarantine and (left_out := self._in_quarantine()):
            fields["quarantined"] = left_out
        return fields

    def _in_quarantine(self) -> dict[str, str]:
        """Digest the names of the pairs in quarantine, by the identity of the teachers that have some."""
        bank, identities = ScoreBank(self.cache / "bank"), [self.teacher_identities[name] for name in scored_teachers(self.recipe)]
        names = {key_of(identity): quarantined_items(bank.open(identity).folder) for identity in identities}
        return {key: key_of({"pairs": found}) for key, found in names.items() if found}

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
            fields["dev"] = self._dev_fields
        return fields

    @cached_property
    def _dev_fields(self) -> dict[str, Any]:
        judged = collection_digest(self.collection_folder, ["queries.jsonl", "qrels/dev.tsv"])
        return {**judged, **self._passages_fields}

    @cached_property
    def _passages_fields(self) -> dict[str, Any]:
        digest = collection_digest(self.collection_folder, ["corpus.jsonl"])
        return {"corpus": digest["corpus.jsonl"], "max_passages": self.recipe.collection.max_passages}

    @property
    def plan_by_student(self) -> dict[str, Plan]:
        """What is measured of the trained students, by system name: those of the rounds before, and the student."""
        names = [*(f"student:round-{number}" for number in range(1, self.recipe.mining.rounds)), "student"]
        return dict(zip(names, self.rounds, strict=True))

    def system_fields(self) -> dict[str, dict[str, Any]]:
        """Return what decides each measured system's ranking, by system name, in the order they are reported."""
        return {name: dict(fields) for name, fields in self._system_fields.items()}

    @cached_property
    def _system_fields(self) -> dict[str, dict[str, Any]]:
        """The same, made once, as every key of a plan is.

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
            if teacher.kind not in ("dense", "sparse"):
                system |= {**bm25, "rerank_depth": evaluation.rerank_depth}
            systems[f"teacher:{teacher.name}"] = system
        if evaluation.students:
            systems["student:untrained"] = {"system": "student", "untrained": self.untrained_fields}
            for name, plan in self.plan_by_student.items():
                systems[name] = {"system": "student", "trained": key_of(plan.student_fields)}
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

    def require_unchanged(self, *kinds: str) -> None:
        """Raise ValueError, naming what differs, if the files that the keys of ``kinds`` were made of are no longer the same.

        To be called before an artifact is published or a model's answers are banked: a key promises the bytes it was made of. The
        collection's files are hashed again, about a second a gigabyte; a model's only if their size or time has changed.
        """
        now = Plan(self.recipe, self.overrides)
        vars(now)["collection"] = self.collection  # in memory, and not read again: its files' digests tell
        for (kind, ours), (_, theirs) in zip(self.artifacts(kinds), now.artifacts(kinds), strict=True):
            changed = differing_fields(ours, theirs)
            if changed:
                shown = "; ".join(f"{name} was {str(was)[:16]}, is {str(found)[:16]}" for name, (was, found) in changed.items())
                raise ValueError(
                    f"{kind} {key_of(ours)}: its inputs changed while it was made ({shown}), so it is not published; what was "
                    "banked stays; run the same command again"
                )

    def artifacts(self, kinds: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
        """Return (kind, fields) of the artifacts of ``kinds``, in the order given; of ``runs`` the fields by system."""
        fields = {
            "candidates": lambda: self.candidates_fields,
            "teachers": lambda: self.trained_teacher_fields,
            "tables": lambda: self.table_fields,
            "students": lambda: self.student_fields,
            "runs": self.system_fields,
            "evaluations": self.evaluation_fields,
        }
        return [(kind, fields[kind]()) for kind in kinds]
