"""Facts of postings, by hand, and the choice of examples."""

from __future__ import annotations

import numpy as np
import scipy.sparse

from sparsekd.evaluation.examples import choose_queries
from sparsekd.evaluation.vocabulary import student_vocabulary, vocabulary_facts
from sparsekd.mining.bm25 import BM25Index


def test_facts_of_four_terms_by_hand() -> None:
    facts = vocabulary_facts({"the": 4, "cat": 2, "dog": 2, "owl": 0}, num_passages=4)

    assert facts == {
        "passages": 4,
        "dims": 4,
        "terms_used": 3,
        "postings": 8,
        "stop_word_share": 0.5,
        "most_active": [["the", 4], ["cat", 2], ["dog", 2]],
        "curve": [[1, 4], [2, 2], [3, 2]],
    }


def test_a_students_postings_are_its_weights_that_are_not_zero() -> None:
    passages = scipy.sparse.csr_matrix(np.array([[1.0, 0, 2], [0, 0, 3], [0, 0, 0]], dtype=np.float32))
    passages.data[0] = 0  # stored, not active

    facts = student_vocabulary(passages, ["cat", "the", "dog"])

    assert (facts["postings"], facts["terms_used"], facts["most_active"]) == (2, 1, [["dog", 2]])
    assert facts["stop_word_share"] == 0


def test_two_dims_of_one_name_stay_two() -> None:
    passages = scipy.sparse.csr_matrix(np.ones((2, 2), dtype=np.float32))

    assert student_vocabulary(passages, ["a", "a"])["most_active"] == [["a", 2], ["a (dim 1)", 2]]


def test_a_collection_without_a_word_has_no_postings() -> None:
    facts = vocabulary_facts(BM25Index({"p": "?"}, 0.9, 0.4).document_frequency, 1)

    assert (facts["postings"], facts["curve"], facts["stop_word_share"]) == (0, [], None)


def test_bm25_counts_passages_by_stem() -> None:
    index = BM25Index({"p0": "cats and cats", "p1": "a cat", "p2": "dogs"}, 0.9, 0.4)

    assert index.document_frequency == {"cat": 2, "and": 1, "dog": 1}


def test_examples_are_best_worst_changed_and_random_each_once() -> None:
    queries = [f"q{number:02}" for number in range(20)]
    student = {query_id: number / 20 for number, query_id in enumerate(queries)}
    untrained = {**student, "q07": 1.0, "q09": 0.0}

    chosen = choose_queries(student, {}, {}, untrained, per_reason=2)

    by_reason = {reason: [q for q, r in chosen.items() if r == reason] for reason in ("best", "worst", "changed", "random")}
    assert by_reason["best"] == ["q19", "q18"]
    assert by_reason["worst"] == ["q00", "q01"]
    assert by_reason["changed"] == ["q07", "q09"]
    assert len(by_reason["random"]) == 2
    assert chosen == choose_queries(dict(reversed(student.items())), {}, {}, untrained, per_reason=2)


def test_ties_of_best_and_worst_go_by_what_the_others_reach() -> None:
    student = {"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.0}

    chosen = choose_queries(student, {"a": 0.9, "b": 0.1}, {"c": 0.2, "d": 0.8}, {}, per_reason=1)

    assert chosen == {"b": "best", "d": "worst", "a": "changed", "c": "random"}
