"""One recipe, carried out: each artifact is found by its key or made from the ones before it.

    candidates -> scores of every (query, positive or candidate) pair in the bank -> score table -> student -> evaluation

Each function returns at once on a hit, without importing torch. Where scores label, every pair of the candidates is scored by
every teacher, not only the pairs that rows use, so that a change of labels never calls a teacher. Where none label, only a
teacher that filters scores; an embedding table has its teacher encode the texts of its rows.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparsekd import gate
from sparsekd.artifact import Artifact, key_of, publish, read_manifest, write_json_atomically
from sparsekd.bank.embeddings import EmbeddingBank
from sparsekd.bank.manifest import locked
from sparsekd.bank.scores import ScoreBank, TeacherScores
from sparsekd.collection.beir import Collection
from sparsekd.doctor import describe, examined
from sparsekd.labels.banked import BankedScores
from sparsekd.labels.building import build_table, scored_teachers
from sparsekd.labels.rows import choose_rows, filter_pairs
from sparsekd.labels.score_table import ScoreTable
from sparsekd.labels.vectors import vector_teacher, vocabulary_digest
from sparsekd.mining.candidates import Candidates
from sparsekd.plan import Plan
from sparsekd.provenance import provenance
from sparsekd.recipe import BM25Teacher, DenseMiner, FileTeacher, Recipe, SparseMiner, Teacher

if TYPE_CHECKING:
    import scipy.sparse
    from sentence_transformers import SparseEncoder

    from sparsekd.teachers.dense import DenseEncoder
    from sparsekd.teachers.protocols import Similarity
    from sparsekd.teachers.scoring import PairTexts, ScoringCounts
    from sparsekd.teachers.sparse import SparseTeacher

logger = logging.getLogger(__name__)


class Experiment:
    """A plan and what carrying it out needs: its collection and the banks."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.recipe: Recipe = plan.recipe
        root = plan.cache / "bank"
        self.score_bank = ScoreBank(root)
        self.embedding_bank = EmbeddingBank(root)

    @property
    def collection(self) -> Collection:
        """The passages, queries and qrels the recipe asks for."""
        return self.plan.collection

    def teacher(self, name: str) -> Teacher | BM25Teacher | FileTeacher:
        """Return the recipe's teacher of that name."""
        return next(teacher for teacher in self.recipe.teachers if teacher.name == name)

    def vector_teacher(self) -> Teacher:
        """Return the one sparse teacher whose vectors label, for labels of kind embedding."""
        teacher = self.teacher(vector_teacher(self.recipe))
        assert isinstance(teacher, Teacher), teacher.kind
        return teacher

    def scores_of(self, teacher: Teacher | BM25Teacher | FileTeacher) -> TeacherScores:
        """Return the banked scores of a teacher."""
        return self.score_bank.open(self.plan.teacher_identities[teacher.name], reference=teacher.reference)

    def provenance(self) -> dict[str, Any]:
        """Return what every manifest says about its making."""
        return {**provenance(self.plan.overrides), "recipe": self.recipe.model_dump(mode="json")}


def candidates(experiment: Experiment) -> Candidates:
    """Find or mine the candidates."""
    plan, fields = experiment.plan, experiment.plan.candidates_fields
    hit = plan.hit("candidates", fields)
    if hit is not None:
        logger.info("candidates %s: hit", hit.key)
        return Candidates.open(hit.folder)
    from sparsekd.mining.miners import mine_candidates

    return mine_candidates(
        experiment.recipe,
        experiment.collection,
        cache=plan.cache,
        fields=fields,
        source=_BankedVectors(experiment),
        extra=experiment.provenance(),
    )


class _BankedVectors:
    """Vectors for dense and sparse miners, through their banks."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._encoders: dict[DenseMiner, DenseEncoder] = {}
        self._sparse: dict[SparseMiner, SparseTeacher] = {}

    def _encoder(self, spec: DenseMiner) -> DenseEncoder:
        from sparsekd.teachers.dense import DenseEncoder

        return self._encoders.setdefault(spec, DenseEncoder(spec, self._experiment.recipe.run))

    def similarity(self, spec: DenseMiner) -> Similarity:
        """Return the similarity the encoder declares."""
        return self._encoder(spec).similarity

    def vectors(self, spec: DenseMiner, texts: Sequence[str], role: Literal["query", "passage"]) -> NDArray[np.float32]:
        """Return float32 [n, D] in the order of ``texts``."""
        from sparsekd.teachers.embedding import banked_vectors

        shard_texts = self._experiment.recipe.run.shard_pairs
        return banked_vectors(self._encoder(spec), self._experiment.embedding_bank, texts, role, shard_texts)

    def sparse_vectors(
        self, spec: SparseMiner, texts: Sequence[str], role: Literal["query", "passage"]
    ) -> scipy.sparse.csr_matrix:
        """Return float32 CSR [n, V] in the order of ``texts``."""
        from sparsekd.teachers.sparse import SparseTeacher, banked_sparse_vectors

        teacher = self._sparse.get(spec) or self._sparse.setdefault(spec, SparseTeacher(spec, self._experiment.recipe.run))
        shard_texts = self._experiment.recipe.run.shard_pairs
        return banked_sparse_vectors(teacher, self._experiment.embedding_bank.sparse, texts, role, shard_texts)


def score_table(experiment: Experiment) -> ScoreTable:
    """Find or build the score table, asking teachers only for what no run has asked them before."""
    plan = experiment.plan
    hit = plan.hit("tables", plan.table_fields)
    if hit is not None:
        logger.info("table %s: hit, no pair scored", hit.key)
        return _examined(experiment, ScoreTable.open(hit.folder))
    mined = candidates(experiment)
    teachers = [experiment.teacher(name) for name in scored_teachers(experiment.recipe)]
    scored, gates = _score_pairs(experiment, mined, teachers)
    counts = {**scored, "mining": mined.counts}
    banked = _banked(experiment, *teachers)
    rows = choose_rows(experiment.recipe, mined, banked)
    table = build_table(
        experiment.recipe,
        rows,
        cache=plan.cache,
        fields=plan.table_fields,
        gold_sim=banked,
        vectors=_TeacherVectors(experiment) if experiment.recipe.labels.kind == "embedding" else None,
        counts=counts,
        extra={**experiment.provenance(), **({"gate": gates} if gates else {})},
    )
    logger.info("pairs: %d, %d scored, %d reused", counts["pairs"], counts["pairs_scored"], counts["pairs_reused"])
    return _examined(experiment, table)


def _examined(experiment: Experiment, table: ScoreTable) -> ScoreTable:
    describe(table, experiment.recipe)
    examined(experiment.plan, table, experiment.provenance())
    return table


class _TeacherVectors:
    """Vectors of the sparse teacher that labels, through the bank; a VectorSource."""

    def __init__(self, experiment: Experiment) -> None:
        from sparsekd.teachers.sparse import SparseTeacher, teacher_vocabulary

        self._experiment = experiment
        spec = experiment.vector_teacher()
        self._teacher = SparseTeacher(spec, experiment.recipe.run)
        self.vocabulary: Mapping[str, int] | None = teacher_vocabulary(spec)

    def vectors(self, role: Literal["query", "passage"], text_ids: Sequence[str]) -> scipy.sparse.csr_matrix:
        """Return float32 CSR [n, V] in the order of ``text_ids``."""
        from sparsekd.teachers.sparse import banked_sparse_vectors

        collection, shard_texts = self._experiment.collection, self._experiment.recipe.run.shard_pairs
        text_by_id = collection.queries if role == "query" else collection.passages
        texts = [text_by_id[text_id] for text_id in text_ids]
        return banked_sparse_vectors(self._teacher, self._experiment.embedding_bank.sparse, texts, role, shard_texts)


def _score_pairs(
    experiment: Experiment, mined: Candidates, teachers: Sequence[Teacher | BM25Teacher | FileTeacher]
) -> tuple[dict[str, int], dict[str, Any]]:
    """Bank these teachers' scores of every (query, positive or candidate).

    Imported scores must be there already, which is seen before a model is asked. Returns pairs, scored and reused over all of them,
    and the figures of the teachers that had to pass the gate.
    """
    total = {"pairs": 0, "pairs_scored": 0, "pairs_reused": 0}
    gates: dict[str, Any] = {}
    if not teachers:
        return total, gates
    query_ids, passage_ids = filter_pairs(mined)
    for teacher in teachers:
        if isinstance(teacher, FileTeacher):
            _require_imported(experiment, teacher, query_ids, passage_ids)
    for teacher in teachers:
        figures = _pass_gate(experiment, teacher, query_ids, passage_ids)
        gates |= {teacher.name: figures} if figures else {}
    texts = _pair_texts(experiment, query_ids, passage_ids)
    for teacher in teachers:
        counts = _bank(experiment, teacher, texts)
        total = {name: value + getattr(counts, name) for name, value in total.items()}
    return total, gates


def _pass_gate(
    experiment: Experiment,
    teacher: Teacher | BM25Teacher | FileTeacher,
    query_ids: Sequence[str],
    passage_ids: Sequence[str],
) -> dict[str, Any] | None:
    """Measure a teacher that has many of these pairs to score; None where it has few, is no model, or the recipe has no gate."""
    if not isinstance(teacher, Teacher) or not teacher.gate:
        return None
    if int(np.isnan(_banked(experiment, teacher)(teacher.name, query_ids, passage_ids)).sum()) < gate.LONG_RUN_PAIRS:
        return None

    def score(query_ids: Sequence[str], passage_ids: Sequence[str]) -> NDArray[np.float32]:
        _bank(experiment, teacher, _pair_texts(experiment, query_ids, passage_ids))
        return _banked(experiment, teacher)(teacher.name, query_ids, passage_ids)

    return gate.check_teacher(teacher.name, experiment.collection, partial(_bm25_passages, experiment), score)


def _banked(experiment: Experiment, *teachers: Teacher | BM25Teacher | FileTeacher) -> BankedScores:
    return BankedScores(experiment.collection, {teacher.name: experiment.scores_of(teacher) for teacher in teachers})


def _pair_texts(experiment: Experiment, query_ids: Sequence[str], passage_ids: Sequence[str]) -> PairTexts:
    from sparsekd.teachers.scoring import PairTexts

    queries, passages = list(dict.fromkeys(query_ids)), list(dict.fromkeys(passage_ids))
    return PairTexts(
        [experiment.collection.queries[query_id] for query_id in queries],
        [experiment.collection.passages[passage_id] for passage_id in passages],
        _positions(query_ids, queries),
        _positions(passage_ids, passages),
    )


def _require_imported(
    experiment: Experiment, teacher: FileTeacher, query_ids: Sequence[str], passage_ids: Sequence[str]
) -> None:
    from sparsekd.teachers.file import require_imported

    gold_sim = _banked(experiment, teacher)(teacher.name, query_ids, passage_ids)
    require_imported(teacher, experiment.scores_of(teacher).folder, gold_sim, query_ids, passage_ids)


def _bank(experiment: Experiment, teacher: Teacher | BM25Teacher | FileTeacher, texts: PairTexts) -> ScoringCounts:
    """Bank one teacher's scores of these pairs."""
    from sparsekd.teachers.scoring import bank_scorer, bank_scores

    run, scores = experiment.recipe.run, experiment.scores_of(teacher)
    if isinstance(teacher, FileTeacher):
        from sparsekd.teachers.file import FileScorer

        return bank_scorer(FileScorer(teacher), teacher.name, run, scores, texts)
    if not isinstance(teacher, BM25Teacher):
        return bank_scores(teacher, run, scores, experiment.embedding_bank, texts)
    from sparsekd.teachers.bm25 import BM25Scorer

    scorer = BM25Scorer(teacher, experiment.collection.passages)
    return bank_scorer(scorer, teacher.name, run, scores, texts, by_query=True)


def _positions(ids: Sequence[str], unique: Sequence[str]) -> NDArray[np.int32]:
    place_by_id = {text_id: place for place, text_id in enumerate(unique)}
    return np.fromiter((place_by_id[text_id] for text_id in ids), dtype=np.int32, count=len(ids))


def student(experiment: Experiment) -> Artifact:
    """Find or train the student; the folder is a plain sentence-transformers model.

    One process trains a key at a time; another that asks for it waits and finds it made.
    """
    plan, fields = experiment.plan, experiment.plan.student_fields
    folder = plan.folder("students", fields)
    work_folder = folder.with_name(f"{folder.name}.work")
    hit = plan.hit("students", fields)
    if hit is None:
        if plan.hit("tables", plan.table_fields) is None:
            from sparsekd.training.fit import check_student

            _check_vocabulary(experiment, check_student(experiment.recipe))  # refused before a teacher is paid
        table = score_table(experiment)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock")):
            hit = plan.hit("students", fields) or _trained(experiment, table, folder, work_folder)
    else:
        logger.info("student %s: hit", hit.key)
    shutil.rmtree(work_folder, ignore_errors=True)  # also what a crash between publishing and this line has left
    return hit


def _check_vocabulary(experiment: Experiment, model: SparseEncoder) -> None:
    """Raise ValueError if vectors are to label whose dims mean other terms than the student's."""
    if experiment.recipe.labels.kind != "embedding":
        return
    from sparsekd.teachers.sparse import teacher_vocabulary
    from sparsekd.training.rows import check_vocabulary

    teacher = experiment.vector_teacher()
    vocabulary = teacher_vocabulary(teacher)
    if vocabulary is not None:
        check_vocabulary(vocabulary_digest(vocabulary), model, f"teacher {teacher.name!r}")


def _trained(experiment: Experiment, table: ScoreTable, folder: Path, work_folder: Path) -> Artifact:
    from sparsekd.training.card import write_card
    from sparsekd.training.fit import train

    fields = experiment.plan.student_fields
    trained = train(
        experiment.recipe,
        table,
        experiment.collection,
        work_folder=work_folder,
        key=key_of(fields),
        first_stage=partial(_bm25_passages, experiment),
    )
    steps = {"steps": trained.num_steps, "resumed_from_step": trained.resumed_from_step}
    extra: dict[str, Any] = {**experiment.provenance(), "counts": {"rows": len(table), **steps, **trained.counts}}
    with publish(folder, kind="student", fields=fields, extra=extra) as temporary:
        trained.model.save_pretrained(str(temporary), create_model_card=False)
        write_card(temporary / "README.md", experiment.recipe, table, extra, trained)
        write_json_atomically(temporary / "training.json", trained.log_history)
    return Artifact(folder, read_manifest(folder))


def _bm25_passages(experiment: Experiment, queries: Sequence[str], depth: int) -> list[list[str]]:
    """Return BM25's best ``depth`` passage_ids for each query, with the evaluation's settings."""
    from sparsekd.mining.bm25 import BM25Index

    settings = experiment.recipe.evaluation
    passage_ids, _ = BM25Index(experiment.collection.passages, settings.k1, settings.b).search(queries, depth)
    return passage_ids
