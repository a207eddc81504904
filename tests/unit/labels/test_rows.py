from __future__ import annotations

from typing import Any

import pytest

from sparsekd.labels.rows import choose_rows, filter_pairs, filtering_teacher

BY_JUDGE = {"by": "judge", "absolute_margin": 1.0}


def test_each_positive_gives_a_row_with_itself_first_and_the_querys_negatives(make_recipe: Any, candidate_row: Any) -> None:
    rows = choose_rows(make_recipe(), [candidate_row("q0", "xy", bm25="abc"), candidate_row("q1", "z", bm25="de")])

    assert rows.query_ids == ["q0", "q0", "q1"]
    assert rows.passage_ids == [["x", "a", "b"], ["y", "a", "b"], ["z", "d", "e"]]


def test_top_interleaves_the_miners_by_rank(make_recipe: Any, candidate_row: Any) -> None:
    row = candidate_row("q0", "x", bm25="abcd", dense="ef")

    rows = choose_rows(make_recipe({"num_negatives": 5}), [row])

    assert rows.passage_ids == [["x", "a", "e", "b", "f", "c"]]


def test_random_draws_without_repeats_and_by_seed(make_recipe: Any, candidate_row: Any) -> None:
    row = candidate_row("q0", "x", bm25="abcdefghijklmnop")

    draws = [
        tuple(choose_rows(make_recipe({"selection": "random", "num_negatives": 5, "seed": seed}), [row]).passage_ids[0][1:])
        for seed in (0, 0, 1, 2)
    ]

    assert draws[0] == draws[1]
    assert len(set(draws)) == 3
    for draw in draws:
        assert len(set(draw)) == 5
        assert set(draw) <= set(row.passage_ids)


def test_random_draws_differ_between_queries_and_reach_every_candidate(make_recipe: Any, candidate_row: Any) -> None:
    recipe = make_recipe({"selection": "random", "num_negatives": 1})

    rows = choose_rows(recipe, [candidate_row(f"q{number}", "x", bm25="abcd") for number in range(200)])

    drawn = [passages[1] for passages in rows.passage_ids]
    assert all(30 <= drawn.count(letter) <= 70 for letter in "abcd")


def scored(known_scores: Any, **by_query: dict[str, float]) -> Any:
    """Judge's scores, one letter a passage."""
    return known_scores({"judge": {(query, letter): score for query, row in by_query.items() for letter, score in row.items()}})


@pytest.mark.parametrize("selection", ["top", "random", "stratified"])
def test_adding_a_query_changes_no_other_row(make_recipe: Any, candidate_row: Any, known_scores: Any, selection: str) -> None:
    recipe = make_recipe({"selection": selection})
    first, second = candidate_row("q0", "x", bm25="abcd", dense="ef"), candidate_row("q1", "y", bm25="abcd", dense="ef")
    row = dict(zip("abcdefxy", (8.0, 7.9, 7.8, 3.0, 1.0, 0.5, 9.0, 9.5), strict=True))
    gold_sim = scored(known_scores, q0=row, q1=row)

    together = choose_rows(recipe, [first, second], gold_sim).passage_ids

    alone = [choose_rows(recipe, [each], gold_sim).passage_ids for each in (first, second)]
    assert together == alone[0] + alone[1]


def test_stratified_negatives_cover_the_teachers_range_where_top_takes_its_best(
    make_recipe: Any, candidate_row: Any, known_scores: Any
) -> None:
    row = candidate_row("q0", "x", bm25="abcdefgh")
    gold_sim = scored(known_scores, q0=dict(zip("xabcdefgh", (12.0, 10.0, 9.9, 9.8, 9.7, 7.0, 3.9, 3.8, 0.0), strict=True)))

    labels = {"selection": "stratified", "num_negatives": 3}
    draws = {
        tuple(choose_rows(make_recipe({**labels, "seed": seed}), [row], gold_sim).passage_ids[0][1:]) for seed in range(60)
    }

    assert {draw[0] for draw in draws} == set("abcde")  # 10 to 6.67
    assert {draw[1] for draw in draws} == set("fg")
    assert {draw[2] for draw in draws} == {"h"}


def test_stratified_selection_reads_what_the_filter_leaves(make_recipe: Any, candidate_row: Any, known_scores: Any) -> None:
    recipe = make_recipe({"selection": "stratified"}, negative_filter=BY_JUDGE)
    gold_sim = scored(known_scores, q0={"x": 5.0, "a": 90.0, "b": 4.0, "c": 3.9, "d": 0.0})

    rows = choose_rows(recipe, [candidate_row("q0", "x", bm25="abcd")], gold_sim)

    assert rows.passage_ids[0][1] in "bc"
    assert rows.passage_ids[0][2] == "d"


def test_stratified_selection_covers_the_named_teachers_range(make_recipe: Any, candidate_row: Any, known_scores: Any) -> None:
    recipe = make_recipe({"selection": "stratified", "selection_teacher": "second"}, teachers=("judge", "second"))
    gold_sim = known_scores({"second": {("q0", letter): score for letter, score in zip("xabc", (9, 5, 0, 0), strict=True)}})

    rows = choose_rows(recipe, [candidate_row("q0", "x", bm25="abc")], gold_sim)

    assert rows.passage_ids[0][1] == "a"
    assert gold_sim.asked == ["second"]


def test_stratified_selection_without_scores_is_refused(make_recipe: Any, candidate_row: Any) -> None:
    with pytest.raises(ValueError, match=r"selection = 'stratified' needs that teacher's scores; none were given \(teacher 'j"):
        choose_rows(make_recipe({"selection": "stratified"}), [candidate_row("q0", "x", bm25="abc")])


def test_too_few_negatives_drop_the_rows_of_a_query_and_count_them(make_recipe: Any, candidate_row: Any) -> None:
    rows = choose_rows(make_recipe(), [candidate_row("q0", "xyz", bm25="a"), candidate_row("q1", "w", bm25="ab")])

    assert rows.query_ids == ["q1"]
    assert rows.dropped == {"too_few_negatives": 3}


def test_no_row_left_is_refused_with_what_to_do(make_recipe: Any, candidate_row: Any) -> None:
    with pytest.raises(
        ValueError, match=r"num_negatives = 2: none of 1 rows has as many candidates left \(0 candidates filtered\); "
    ):
        choose_rows(make_recipe(), [candidate_row("q0", "x", bm25="a")])


def test_pairs_are_those_of_the_rows_each_once(make_recipe: Any, candidate_row: Any) -> None:
    rows = choose_rows(make_recipe(), [candidate_row("q0", "xy", bm25="abcd")])

    assert list(zip(*rows.pairs(), strict=True)) == [("q0", "x"), ("q0", "a"), ("q0", "b"), ("q0", "y")]


def test_a_filtering_teacher_must_know_every_candidate(make_recipe: Any, candidate_row: Any) -> None:
    assert filter_pairs([candidate_row("q0", "xy", bm25="ab")]) == (["q0"] * 4, ["x", "y", "a", "b"])
    assert filtering_teacher(make_recipe(negative_filter=BY_JUDGE)) == "judge"
    assert filtering_teacher(make_recipe(negative_filter={"by": "judge"})) is None
    assert filtering_teacher(make_recipe(negative_filter={"absolute_margin": 1.0})) is None


def test_the_teachers_weakest_positive_sets_the_ceiling_for_all_rows_of_the_query(
    make_recipe: Any, candidate_row: Any, known_scores: Any
) -> None:
    scores = {"x": 9.0, "y": 5.0, "a": 4.5, "b": 4.0, "c": 3.0, "d": -2.0}
    gold_sim = known_scores({"judge": {("q0", passage_id): score for passage_id, score in scores.items()}})

    rows = choose_rows(make_recipe(negative_filter=BY_JUDGE), [candidate_row("q0", "xy", bm25="abcd")], gold_sim)

    assert rows.passage_ids == [["x", "b", "c"], ["y", "b", "c"]]  # a is above 5 − 1, b at it
    assert rows.candidates_dropped_filter == 1


def test_a_relative_margin_is_right_for_negative_logits(make_recipe: Any, candidate_row: Any, known_scores: Any) -> None:
    scores = {"x": -8.0, "a": -9.0, "b": -10.0, "c": -11.0}
    gold_sim = known_scores({"judge": {("q0", passage_id): score for passage_id, score in scores.items()}})
    recipe = make_recipe(negative_filter={"by": "judge", "relative_margin": 0.25})

    rows = choose_rows(recipe, [candidate_row("q0", "x", bm25="abc")], gold_sim)

    assert rows.passage_ids == [["x", "b", "c"]]


def test_a_filter_without_scores_is_refused(make_recipe: Any, candidate_row: Any, known_scores: Any) -> None:
    recipe, candidates = make_recipe(negative_filter=BY_JUDGE), [candidate_row("q0", "x", bm25="ab")]

    with pytest.raises(
        ValueError, match=r"2 of 3 pairs have no finite gold_sim by teacher 'judge' \(first: query 'q0', passage 'a'\)"
    ):
        choose_rows(recipe, candidates, known_scores({"judge": {("q0", "x"): 1.0}}))
    with pytest.raises(ValueError, match="by = 'judge' needs that teacher's scores; none were given"):
        choose_rows(recipe, candidates)


def test_a_percentile_of_the_teachers_scores_of_positives_is_a_ceiling(
    make_recipe: Any, candidate_row: Any, known_scores: Any
) -> None:
    recipe = make_recipe({"num_negatives": 1}, negative_filter={"by": "judge", "percentile": 50.0})
    gold_sim = scored(known_scores, q0={"x": 9.0, "a": 5.5, "b": 5.0}, q1={"y": 1.0, "a": 8.0, "b": 0.5})

    rows = choose_rows(recipe, [candidate_row("q0", "x", bm25="ab"), candidate_row("q1", "y", bm25="ab")], gold_sim)

    assert rows.passage_ids == [["x", "b"], ["y", "b"]]  # the median of 9 and 1 is 5
    assert rows.candidates_dropped_filter == 2


def test_a_positive_below_the_minimum_makes_no_row_sets_no_ceiling_and_is_counted(
    make_recipe: Any, candidate_row: Any, known_scores: Any
) -> None:
    negative_filter = {"by": "judge", "min_positive": 2.0, "absolute_margin": 1.0}
    gold_sim = scored(known_scores, q0={"x": 9.0, "y": 1.9, "a": 8.0, "b": 3.0}, q1={"z": -4.0, "a": 0.0, "b": 0.0})
    candidates = [candidate_row("q0", "xy", bm25="ab"), candidate_row("q1", "z", bm25="ab")]

    rows = choose_rows(make_recipe(negative_filter=negative_filter), candidates, gold_sim)

    assert rows.passage_ids == [["x", "a", "b"]]
    assert rows.dropped == {"too_few_negatives": 0, "positive_below_minimum": 2}


@pytest.mark.parametrize("percentile", [None, 95.0])
def test_no_positive_left_is_refused_with_the_number_below_the_minimum(
    make_recipe: Any, candidate_row: Any, known_scores: Any, percentile: float | None
) -> None:
    recipe = make_recipe(negative_filter={"by": "judge", "min_positive": 2.0, "percentile": percentile})

    with pytest.raises(ValueError, match=r"none of 1 rows .* \(0 candidates filtered, 1 positives below min_positive\)"):
        choose_rows(recipe, [candidate_row("q0", "x", bm25="ab")], scored(known_scores, q0={"x": 1.0, "a": 0.0, "b": 0.0}))


def test_candidates_at_or_above_the_threshold_become_positives_and_nobodys_negatives(
    make_recipe: Any, candidate_row: Any, known_scores: Any
) -> None:
    gold_sim = scored(known_scores, q0={"x": 5.0, "a": 7.5, "b": 1.0, "c": 8.0, "d": 7.4}, q1={"y": 9.0, "a": 0.0, "b": 0.0})
    candidates = [candidate_row("q0", "x", bm25="abcd"), candidate_row("q1", "y", bm25="ab")]

    rows = choose_rows(make_recipe({"promote_above": 7.5}), candidates, gold_sim)

    assert rows.query_ids == ["q0", "q0", "q0", "q1"]
    assert rows.passage_ids == [["x", "b", "d"], ["c", "b", "d"], ["a", "b", "d"], ["y", "a", "b"]]
    assert rows.promoted == [("q0", "c", 8.0), ("q0", "a", 7.5)]


def test_a_promoted_positive_is_no_filtered_candidate_and_sets_no_ceiling(
    make_recipe: Any, candidate_row: Any, known_scores: Any
) -> None:
    gold_sim = scored(known_scores, q0={"x": 9.0, "a": 8.5, "b": 8.4, "c": 8.0, "d": 7.9, "e": 0.0})
    recipe = make_recipe({"promote_above": 8.5}, negative_filter=BY_JUDGE)

    rows = choose_rows(recipe, [candidate_row("q0", "x", bm25="abcde")], gold_sim)

    assert rows.passage_ids == [["x", "c", "d"], ["a", "c", "d"]]  # b is above 9 − 1
    assert rows.candidates_dropped_filter == 1


def test_rows_of_promoted_positives_are_dropped_with_the_querys_others(
    make_recipe: Any, candidate_row: Any, known_scores: Any
) -> None:
    gold_sim = scored(known_scores, q0={"x": 5.0, "a": 8.0, "b": 1.0}, q1={"y": 9.0, "a": 0.0, "b": 0.0})
    candidates = [candidate_row("q0", "x", bm25="ab"), candidate_row("q1", "y", bm25="ab")]

    rows = choose_rows(make_recipe({"promote_above": 7.5}), candidates, gold_sim)

    assert rows.query_ids == ["q1"]
    assert rows.promoted == []
    assert rows.dropped == {"too_few_negatives": 2}


def test_promotion_without_scores_is_refused(make_recipe: Any, candidate_row: Any) -> None:
    with pytest.raises(ValueError, match=r"\[labels\] promote_above = 7.5 needs that teacher's scores; none were given \(teacher"):
        choose_rows(make_recipe({"promote_above": 7.5}), [candidate_row("q0", "x", bm25="abc")])
