"""What the student is compared with: BM25, and each teacher in the role it can play.

A dense, sparse or bm25 teacher searches all passages; one that scores pairs reranks BM25's best. Vectors and scores go through
the bank, so a second evaluation loads no teacher. A reranking is ``evaluation.rerank_depth`` deep, every other at least DEPTH.
"""

from __future__ import annotations

import numpy as np

from sparsekd.bank.embeddings import EmbeddingBank
from sparsekd.bank.scores import ScoreBank
from sparsekd.collection.beir import Collection, Qrels
from sparsekd.evaluation.measures import DEPTH
from sparsekd.evaluation.runs import Ranking, Rankings, ranked
from sparsekd.evaluation.student import sparse_rankings, sparsity
from sparsekd.labels.banked import BankedScores
from sparsekd.mining.bm25 import BM25Index
from sparsekd.mining.dense import dense_search
from sparsekd.mining.ranking import Scores
from sparsekd.recipe import BM25Teacher, CallableTeacher, Recipe, Teacher, TokenLogitTeacher
from sparsekd.teachers.dense import DenseEncoder
from sparsekd.teachers.embedding import banked_vectors
from sparsekd.teachers.protocols import Encoder, Scorer
from sparsekd.teachers.scorers import make_scorer
from sparsekd.teachers.scoring import PairTexts, bank_scorer
from sparsekd.teachers.sparse import SparseTeacher, banked_sparse_vectors


def judgements(recipe: Recipe, collection: Collection, split: str) -> Qrels:
    """Return the qrels of the split that is measured.

    Raises ValueError naming the missing file and the splits there are, or saying that sampling left no query.
    """
    place = f"[evaluation] split = {split!r}: {recipe.collection.path}/qrels/{split}.tsv"
    there = ", ".join(name for name, qrels in collection.qrels.items() if qrels) or "none"
    if split not in collection.qrels:
        raise ValueError(f"{place}: no such file; splits with judgements: {there}; add the file, or choose another split")
    if not collection.qrels[split]:
        raise ValueError(
            f"{place}: no query has a positive among the {len(collection.passages)} passages kept; splits with judgements: "
            f"{there}; raise [collection] max_passages, or choose another split"
        )
    return collection.qrels[split]


def bm25_index(recipe: Recipe, collection: Collection, teacher: BM25Teacher | None = None) -> BM25Index:
    """Return BM25 over the passages. k1 and b are the teacher's; without one the evaluation's, the baseline."""
    settings = teacher or recipe.evaluation
    return BM25Index(collection.passages, settings.k1, settings.b)


def bm25_rankings(recipe: Recipe, collection: Collection, split: str, *, index: BM25Index | None = None) -> dict[str, Ranking]:
    """Return BM25's ranking of every judged query, DEPTH or ``evaluation.rerank_depth`` deep, whichever is more.

    ``index`` searches; without one the baseline's is built.
    """
    query_ids = list(judgements(recipe, collection, split))
    index = index or bm25_index(recipe, collection)
    depth = max(DEPTH, recipe.evaluation.rerank_depth)
    ids, scores = index.search([collection.queries[query_id] for query_id in query_ids], depth)
    return _by_query(query_ids, ids, scores)


def dense_rankings(
    teacher: Teacher, recipe: Recipe, collection: Collection, split: str, embeddings: EmbeddingBank
) -> dict[str, Ranking]:
    """Return a dense teacher's exact ranking of all passages for every judged query, DEPTH deep.

    Raises ValueError for a similarity that has no exact search (manhattan), or a CUDA device that FAISS cannot use.
    """
    judgements(recipe, collection, split)  # before the weights are digested
    return encoder_rankings(DenseEncoder(teacher, recipe.run), recipe, collection, split, embeddings)


def encoder_rankings(
    encoder: Encoder, recipe: Recipe, collection: Collection, split: str, embeddings: EmbeddingBank
) -> dict[str, Ranking]:
    """Return the same from any Encoder."""
    query_ids = list(judgements(recipe, collection, split))
    queries = [collection.queries[query_id] for query_id in query_ids]
    ids, scores = dense_search(
        banked_vectors(encoder, embeddings, queries, "query", recipe.run),
        banked_vectors(encoder, embeddings, list(collection.passages.values()), "passage", recipe.run),
        list(collection.passages),
        similarity=encoder.similarity,
        depth=DEPTH,
        device=recipe.run.search_device or recipe.run.device,
    )
    return _by_query(query_ids, ids, scores)


def sparse_teacher_rankings(
    teacher: Teacher, recipe: Recipe, collection: Collection, split: str, embeddings: EmbeddingBank
) -> tuple[dict[str, Ranking], dict[str, float]]:
    """Return a sparse teacher's exact ranking of all passages for every judged query, DEPTH deep, and how sparse it is.

    Only passages that share an active dim with a query are ranked, as for the student.
    """
    query_ids = list(judgements(recipe, collection, split))  # before the weights are digested
    encoder, bank = SparseTeacher(teacher, recipe.run), embeddings.sparse
    queries = [collection.queries[query_id] for query_id in query_ids]
    query_csr = banked_sparse_vectors(encoder, bank, queries, "query", recipe.run)
    passage_csr = banked_sparse_vectors(encoder, bank, list(collection.passages.values()), "passage", recipe.run)
    return sparse_rankings(query_csr, passage_csr, query_ids, list(collection.passages)), sparsity(query_csr, passage_csr)


def rerank_rankings(
    teacher: Teacher | TokenLogitTeacher | CallableTeacher,
    recipe: Recipe,
    collection: Collection,
    first: Rankings,
    bank: ScoreBank,
) -> dict[str, Ranking]:
    """Return a teacher's order, pair by pair, of the best ``evaluation.rerank_depth`` passages of ``first`` (BM25's rankings)."""
    return scorer_rankings(make_scorer(teacher, recipe.run), teacher.name, recipe, collection, first, bank)


def scorer_rankings(
    scorer: Scorer, name: str, recipe: Recipe, collection: Collection, first: Rankings, bank: ScoreBank
) -> dict[str, Ranking]:
    """Return the same from any Scorer; ``name`` is for the log."""
    best = {query_id: ranking.passage_ids[: recipe.evaluation.rerank_depth] for query_id, ranking in first.items()}
    scores = bank.open(scorer.identity, reference=name)
    bank_scorer(scorer, name, recipe.run, scores, _pair_texts(best, collection))
    gold_sim = BankedScores(collection, {name: scores})
    return {
        query_id: ranked(passage_ids, gold_sim(name, [query_id] * len(passage_ids), passage_ids))
        for query_id, passage_ids in best.items()
    }


def _by_query(query_ids: list[str], ids: list[list[str]], scores: list[Scores]) -> dict[str, Ranking]:
    hits = map(Ranking, ids, scores)  # in order already: both searches break ties by passage_id
    return dict(zip(query_ids, hits, strict=True))


def _pair_texts(best: dict[str, list[str]], collection: Collection) -> PairTexts:
    passage_ids = list(dict.fromkeys(passage_id for ids in best.values() for passage_id in ids))
    place_by_id = {passage_id: place for place, passage_id in enumerate(passage_ids)}
    return PairTexts(
        queries=[collection.queries[query_id] for query_id in best],
        passages=[collection.passages[passage_id] for passage_id in passage_ids],
        query_index=np.repeat(np.arange(len(best), dtype=np.int32), [len(ids) for ids in best.values()]),
        passage_index=np.array([place_by_id[passage_id] for ids in best.values() for passage_id in ids], dtype=np.int32),
    )
