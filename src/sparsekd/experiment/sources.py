"""An experiment: a plan, its collection and its banks, and the vectors that miners and labels take through these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparsekd.bank.embeddings import EmbeddingBank
from sparsekd.bank.scores import ScoreBank, TeacherScores
from sparsekd.collection.beir import Collection
from sparsekd.labels.banked import BankedScores
from sparsekd.labels.vectors import vector_teacher
from sparsekd.plan import Plan
from sparsekd.provenance import provenance
from sparsekd.recipe import AnyTeacher, DenseMiner, Recipe, SparseMiner, Teacher

if TYPE_CHECKING:
    import scipy.sparse

    from sparsekd.teachers.dense import DenseEncoder
    from sparsekd.teachers.protocols import Similarity
    from sparsekd.teachers.sparse import SparseTeacher


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

    def teacher(self, name: str) -> AnyTeacher:
        """Return the recipe's teacher of that name; one's own cross-encoder with the folder it was trained into."""
        return next(teacher for teacher in self.plan.teachers if teacher.name == name)

    def vector_teacher(self) -> Teacher:
        """Return the one sparse teacher whose vectors label, for labels of kind embedding."""
        teacher = self.teacher(vector_teacher(self.recipe))
        assert isinstance(teacher, Teacher), teacher.kind
        return teacher

    def scores_of(self, teacher: AnyTeacher) -> TeacherScores:
        """Return the banked scores of a teacher."""
        return self.score_bank.open(self.plan.teacher_identities[teacher.name], reference=teacher.reference)

    def banked(self, *teachers: AnyTeacher) -> BankedScores:
        """Return what looks up banked scores of these teachers."""
        return BankedScores(self.collection, {teacher.name: self.scores_of(teacher) for teacher in teachers})

    def provenance(self) -> dict[str, Any]:
        """Return what every manifest says about its making."""
        return {**provenance(self.plan.overrides), "recipe": self.recipe.model_dump(mode="json")}

    def bm25_passages(self, queries: Sequence[str], depth: int) -> list[list[str]]:
        """Return BM25's best ``depth`` passage_ids for each query, with the evaluation's settings."""
        from sparsekd.mining.bm25 import BM25Index

        settings = self.recipe.evaluation
        passage_ids, _ = BM25Index(self.collection.passages, settings.k1, settings.b).search(queries, depth)
        return passage_ids


class MinerVectors:
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

        return banked_vectors(self._encoder(spec), self._experiment.embedding_bank, texts, role, self._experiment.recipe.run)

    def sparse_vectors(
        self, spec: SparseMiner, texts: Sequence[str], role: Literal["query", "passage"]
    ) -> scipy.sparse.csr_matrix:
        """Return float32 CSR [n, V] in the order of ``texts``."""
        from sparsekd.teachers.sparse import SparseTeacher, banked_sparse_vectors

        teacher = self._sparse.get(spec) or self._sparse.setdefault(spec, SparseTeacher(spec, self._experiment.recipe.run))
        return banked_sparse_vectors(teacher, self._experiment.embedding_bank.sparse, texts, role, self._experiment.recipe.run)


class TeacherVectors:
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

        collection, run = self._experiment.collection, self._experiment.recipe.run
        text_by_id = collection.queries if role == "query" else collection.passages
        texts = [text_by_id[text_id] for text_id in text_ids]
        return banked_sparse_vectors(self._teacher, self._experiment.embedding_bank.sparse, texts, role, run)
