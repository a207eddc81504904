"""The sections of a recipe that say how candidates are found: miners, rounds, the filter, what is done where they fall short."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sparsekd.recipe.section import EncoderSpec, Section


class _Miner(Section):
    kind: str
    quota: int = Field(ge=1)
    """Candidates this miner contributes per query, after positives and duplicates are taken out."""
    depth: int = Field(default=100, ge=1)
    """Passages proposed per query, from which the quota is filled in rank order."""


class _RankingMiner(_Miner):
    skip: int = Field(default=0, ge=0)
    """Leading ranks left out: the likeliest unjudged positives."""


class BM25Miner(_RankingMiner):
    """Proposes passages by BM25 (Lucene variant, Porter stemmer)."""

    kind: Literal["bm25"]
    k1: float = Field(default=0.9, gt=0)
    """Term-frequency saturation; 0.9 is Anserini's default."""
    b: float = Field(default=0.4, ge=0, le=1)
    """Length normalisation; 0.4 is Anserini's default."""


class DenseMiner(_RankingMiner, EncoderSpec):
    """Proposes passages by search over a bi-encoder's vectors, in its own similarity."""

    kind: Literal["dense"]
    index: Literal["flat", "ivf-flat", "ivf-pq", "hnsw"] = "flat"
    """FAISS index. ``flat`` is exact; the others find fewer of the best in less time; their parameters follow from the number of
    passages, and their recall is measured."""


class SparseMiner(_RankingMiner, EncoderSpec):
    """Proposes passages by exact search over a SparseEncoder's vectors: another project's, or the student of an earlier round."""

    kind: Literal["sparse"]


class RunMiner(_RankingMiner):
    """Proposes what a TREC run file ranks, whoever made it."""

    kind: Literal["run"]
    path: str = Field(min_length=1)
    """The file, absolute or relative to the working directory; its path enters no key, its bytes do."""


class RandomMiner(_Miner):
    """Proposes passages drawn from the whole collection, seeded per query id; they have no score."""

    kind: Literal["random"]
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the draws."""

    @property
    def skip(self) -> int:
        """Return 0: a draw has no leading ranks."""
        return 0


Miner = BM25Miner | DenseMiner | SparseMiner | RunMiner | RandomMiner


class StudentMiner(Section):
    """From the second round on, proposes passages by exact search over the vectors of the student that the round before trained."""

    quota: int = Field(default=8, ge=1)
    """Candidates each such student contributes per query, beside all that were there before it; no more than these are scored anew.
    8 doubles what one miner of the recipes here brings."""
    depth: int = Field(default=100, ge=1)
    """Passages proposed per query, from which the quota is filled in rank order."""
    skip: int = Field(default=0, ge=0)
    """Leading ranks left out: the likeliest unjudged positives."""


class NegativeFilter(Section):
    """Takes out likely false negatives by comparing each candidate with the query's positives, the weakest where scores decide."""

    by: str = "miner"
    """Whose scores decide: ``miner`` (the one that proposed the candidate) or a teacher's name."""
    absolute_margin: float | None = Field(default=None, ge=0)
    """Drop a candidate scoring above positive − margin."""
    relative_margin: float | None = Field(default=None, ge=0)
    """Drop a candidate scoring above positive − margin × |positive|; the absolute value keeps it right for logits below 0."""
    percentile: float | None = Field(default=None, ge=0, le=100)
    """Drop a candidate scoring above this percentile of all positives' scores: no margin to guess, whatever the scorer's scale; but
    the limit depends on all queries."""
    min_positive: float | None = None
    """Leave out rows whose positive the teacher scores below this: a judgement it does not share. Needs a teacher in ``by``."""
    near_duplicate: float | None = Field(default=None, gt=0, le=1)
    """Drop a candidate that has the words of a positive in their order, whatever the case and punctuation, or shares at least this
    part of both texts' words (Jaccard); .9 takes copies and small edits. Compares texts, whoever ``by`` is."""

    @property
    def reads_scores(self) -> bool:
        """Whether it can drop anything for its score."""
        return any(value is not None for value in (self.absolute_margin, self.relative_margin, self.percentile, self.min_positive))


class Mining(Section):
    """Which passages become candidates for each training query."""

    miners: tuple[Annotated[Miner, Field(discriminator="kind")], ...] = Field(min_length=1, strict=False)
    """Asked in order; a passage proposed twice counts for the first."""
    fallback: Annotated[Miner, Field(discriminator="kind")] | None = None
    """Miner asked last, for queries that the others leave with fewer candidates than their quotas add up to: it contributes what is
    missing, at most its own quota. None leaves them short; rows that cannot be filled are then dropped and counted."""
    filter: NegativeFilter = NegativeFilter()
    """Positive-aware filter; as it stands by default it drops nothing."""
    max_positives: int | None = Field(default=None, ge=1)
    """Positives scored per query, highest grade first, then smallest sha256(passage_id). None takes all."""
    rounds: int = Field(default=1, ge=1)
    """Times a student is trained. From the second on the student of the round before mines too, its candidates join those of all
    miners, and only new pairs reach the teachers. Each round starts from the same weights, as in SPLADE v2's two-step distillation
    (arXiv 2109.10086): a student differs from the one before by its candidates alone."""
    student_miner: StudentMiner = StudentMiner()
    """How the students of earlier rounds mine; needs ``rounds`` above 1."""

    @property
    def asked(self) -> tuple[Miner, ...]:
        """All miners in the order they are asked, the fallback last."""
        return self.miners if self.fallback is None else (*self.miners, self.fallback)
