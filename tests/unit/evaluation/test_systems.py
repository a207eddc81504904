"""Baselines: what BM25 and the teachers rank, through the bank, and how a missing split is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.bank.embeddings import EmbeddingBank
from sparsekd.bank.scores import ScoreBank
from sparsekd.collection.beir import Collection
from sparsekd.evaluation.runs import Ranking, ranked
from sparsekd.evaluation.systems import (
    bm25_index,
    bm25_rankings,
    dense_rankings,
    encoder_rankings,
    judgements,
    rerank_rankings,
    scorer_rankings,
    sparse_teacher_rankings,
)
from sparsekd.recipe import BM25Teacher, Recipe, Run, Teacher

Make = Callable[..., Recipe]


def ids(rankings: dict[str, Ranking]) -> dict[str, list[str]]:
    return {query_id: ranking.passage_ids for query_id, ranking in rankings.items()}


def test_bm25_ranks_the_judged_queries_of_the_split_only(make_recipe: Make, collection: Collection) -> None:
    rankings = bm25_rankings(make_recipe(), collection, "test")

    assert ids(rankings) == {"q0": ["p0", "p3", "p4", "p1", "p2"], "q1": ["p5", "p3"], "q2": []}
    assert all((np.diff(ranking.scores) <= 0).all() for ranking in rankings.values())


@pytest.mark.parametrize(("rerank_depth", "depth"), [(1, 100), (100, 100), (150, 150)])
def test_bm25_is_as_deep_as_measures_and_reranking_need(make_recipe: Make, rerank_depth: int, depth: int) -> None:
    passages = {f"p{number:03}": "cat" for number in range(200)}
    collection = Collection(passages, {"q": "cat"}, {"test": {"q": {"p000": 1}}}, {})

    rankings = bm25_rankings(make_recipe(rerank_depth=rerank_depth), collection, "test")

    assert rankings["q"].passage_ids == list(passages)[:depth]


def test_a_bm25_teacher_ranks_by_its_own_k1_and_b(make_recipe: Make, collection: Collection) -> None:
    teacher = BM25Teacher(name="b", kind="bm25", k1=1.2, b=0.75)

    rankings = bm25_rankings(make_recipe(), collection, "test", index=bm25_index(make_recipe(), collection, teacher))

    expected, baseline = (bm25_rankings(make_recipe(**settings), collection, "test") for settings in ({"k1": 1.2, "b": 0.75}, {}))
    assert ids(rankings) == ids(expected)
    assert [ranking.scores.tolist() for ranking in rankings.values()] == [found.scores.tolist() for found in expected.values()]
    assert rankings["q0"].scores.tolist() != baseline["q0"].scores.tolist()


def test_an_encoder_ranks_all_passages_and_a_second_time_from_the_bank(
    make_recipe: Make, collection: Collection, word_counter: Any, tmp_path: Path
) -> None:
    bank = EmbeddingBank(tmp_path)

    rankings = encoder_rankings(word_counter, make_recipe(), collection, "test", bank)

    assert ids(rankings)["q0"] == ["p0", "p1", "p2", "p4", "p3", "p5"]
    assert rankings["q1"].scores.tolist() == [2, 1, 0, 0, 0, 0]
    num_asked = len(word_counter.asked)
    assert ids(encoder_rankings(word_counter, make_recipe(), collection, "test", bank)) == ids(rankings)
    assert (num_asked, len(word_counter.asked)) == (8, 8)  # 3 queries and 5 different passages, once


def test_a_scorer_reranks_the_best_of_bm25_and_a_second_time_from_the_bank(
    make_recipe: Make, collection: Collection, word_counter: Any, tmp_path: Path
) -> None:
    recipe, bank = make_recipe(rerank_depth=4), ScoreBank(tmp_path)
    first = {"q0": ranked(["p4", "p2", "p1", "p0", "p5"], [9, 8, 7, 6, 5]), "q1": ranked(["p3"], [1]), "q2": ranked([], [])}

    rankings = scorer_rankings(word_counter, "words", recipe, collection, first, bank)

    assert ids(rankings) == {"q0": ["p0", "p1", "p2", "p4"], "q1": ["p3"], "q2": []}
    assert rankings["q0"].scores.tolist() == [3, 1, 1, 1]
    assert len(word_counter.asked) == 4  # p1 and p2 have one text
    assert ids(scorer_rankings(word_counter, "words", recipe, collection, first, bank)) == ids(rankings)
    assert len(word_counter.asked) == 4


def test_rerank_depth_may_grow_and_only_the_new_pairs_are_scored(
    make_recipe: Make, collection: Collection, word_counter: Any, tmp_path: Path
) -> None:
    first = {"q0": ranked(["p4", "p0", "p5"], [3, 2, 1])}
    scorer_rankings(word_counter, "words", make_recipe(rerank_depth=2), collection, first, ScoreBank(tmp_path))
    word_counter.asked.clear()

    scorer_rankings(word_counter, "words", make_recipe(rerank_depth=3), collection, first, ScoreBank(tmp_path))

    assert word_counter.asked == [("cat and dog", "snow on the mountain")]


def test_no_first_ranking_at_all_is_no_reranking(
    make_recipe: Make, collection: Collection, word_counter: Any, tmp_path: Path
) -> None:
    rankings = scorer_rankings(word_counter, "w", make_recipe(), collection, {"q2": ranked([], [])}, ScoreBank(tmp_path))

    assert ids(rankings) == {"q2": []}


def test_real_teachers_rank_too(
    make_recipe: Make, collection: Collection, tmp_path: Path, tiny_encoder_folder: Path, tiny_cross_encoder_folder: Path
) -> None:
    recipe = make_recipe(rerank_depth=2)
    dense = Teacher(name="d", kind="dense", model=str(tiny_encoder_folder))
    cross = Teacher(name="c", kind="cross-encoder", model=str(tiny_cross_encoder_folder))
    bm25 = bm25_rankings(recipe, collection, "test")

    searched = dense_rankings(dense, recipe, collection, "test", EmbeddingBank(tmp_path))
    reranked = rerank_rankings(cross, recipe, collection, bm25, ScoreBank(tmp_path))

    assert {query_id: sorted(found) for query_id, found in ids(searched).items()} == {
        query_id: sorted(collection.passages) for query_id in ("q0", "q1", "q2")
    }
    assert {query_id: sorted(found) for query_id, found in ids(reranked).items()} == {
        "q0": ["p0", "p3"],
        "q1": ["p3", "p5"],
        "q2": [],
    }


def test_a_sparse_teacher_ranks_all_passages_by_its_dot_product(
    make_recipe: Make, collection: Collection, tmp_path: Path, tiny_splade_folder: Path
) -> None:
    from sentence_transformers import SparseEncoder

    teacher = Teacher(name="s", kind="sparse", model=str(tiny_splade_folder))
    bank = EmbeddingBank(tmp_path)

    rankings, figures = sparse_teacher_rankings(teacher, make_recipe(), collection, "test", bank)

    model = SparseEncoder(str(tiny_splade_folder), device="cpu")
    passages = model.encode_document(list(collection.passages.values()), convert_to_sparse_tensor=False)
    queries = model.encode_query([collection.queries[query_id] for query_id in rankings], prompt="", convert_to_sparse_tensor=False)
    for (query_id, ranking), scores in zip(rankings.items(), (queries @ passages.T).numpy(), strict=True):
        expected = ranked(list(collection.passages), scores)
        found = dict(zip(ranking.passage_ids, ranking.scores.tolist(), strict=True))
        assert found == pytest.approx(dict(zip(expected.passage_ids, expected.scores.tolist(), strict=True)), rel=1e-4), query_id
    assert figures["query_active_dims"] == pytest.approx(float((queries != 0).sum(dim=1).float().mean()))
    # The device does not exist, so encoding anything would be refused.
    elsewhere = make_recipe().model_copy(update={"run": Run(device="cuda:99")})
    assert ids(sparse_teacher_rankings(teacher, elsewhere, collection, "test", bank)[0]) == ids(rankings)


def test_a_split_without_a_file_is_named_with_those_there_are(make_recipe: Make) -> None:
    collection = Collection({"p": "x"}, {"q": "x"}, {"train": {"q": {"p": 1}}, "dev": {"q": {"p": 1}}}, {})

    for refuse in (judgements, bm25_rankings):
        with pytest.raises(ValueError, match=r"'test': data/animals/qrels/test\.tsv: no such file; .*: train, dev; add"):
            refuse(make_recipe(), collection, "test")


def test_a_missing_split_is_refused_before_a_teacher_is_looked_for(
    make_recipe: Make, collection: Collection, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"qrels/dev\.tsv"):
        dense_rankings(make_recipe().teachers[0], make_recipe(), collection, "dev", EmbeddingBank(tmp_path))


def test_a_split_that_sampling_emptied_says_so(make_recipe: Make, collection: Collection) -> None:
    with pytest.raises(ValueError, match=r"no query has a positive among the 6 passages kept; .*: train, test; raise"):
        judgements(make_recipe(), collection, "dev")
