"""Ensembles as views: published recipes by hand, one calibration per teacher, pairs not scored, and what keys say of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.artifact import key_of
from sparsekd.labels.building import build_table, table_fields
from sparsekd.labels.rows import choose_rows
from sparsekd.labels.score_table import ScoreTable

NAMES = ("large", "base", "albert")
IDENTITIES = {name: {"weights": name} for name in NAMES}
# Logits of q0: x | a b and q1: y | c d
LARGE = {"x": 8.0, "a": 2.0, "b": 5.0, "y": 1.0, "c": 9.0, "d": -3.0}
BASE = {"x": 4.0, "a": -2.0, "b": 1.0, "y": 3.0, "c": 2.0, "d": 0.0}
ALBERT = {"x": 9.0, "a": 3.0, "b": 0.0, "y": 5.0, "c": 1.0, "d": -3.0}
SCORES = {"large": LARGE, "base": BASE, "albert": ALBERT}


@pytest.fixture
def build(tmp_path: Path, make_recipe: Any, candidate_row: Any, known_scores: Any) -> Callable[..., ScoreTable]:
    """Return ``build(labels, **scores)`` over q0: x | a b and q1: y | c d, by the first teachers of NAMES that ``scores`` has."""

    def make(labels: dict[str, Any] | None = None, /, **scores: dict[str, float]) -> ScoreTable:
        by_teacher = scores or SCORES
        recipe = make_recipe(labels, teachers=list(by_teacher))
        rows = choose_rows(recipe, [candidate_row("q0", "x", bm25="ab"), candidate_row("q1", "y", bm25="cd")])
        gold_sim = known_scores(
            {teacher: {(query, passage): score for query in ("q0", "q1") for passage, score in known.items()}
             for teacher, known in by_teacher.items()}
        )  # fmt: skip
        return build_table(recipe, rows, cache=tmp_path, fields=table_fields(recipe, "c", IDENTITIES), gold_sim=gold_sim)

    return make


def keys_of(make_recipe: Any, *views: dict[str, Any], teachers: tuple[str, ...] = NAMES) -> list[str]:
    return [key_of(table_fields(make_recipe(labels, teachers=teachers), "c", IDENTITIES)) for labels in views]


# Published ensembles


def test_hofstaetters_t2_is_the_mean_of_three_raw_logits(build: Any) -> None:
    table = build()  # Hofstätter et al. 2020, arXiv 2010.02666: teacher "T2"

    # (8+4+9)/3 (2−2+3)/3 (5+1+0)/3, (1+3+5)/3 (9+2+1)/3 (−3+0−3)/3
    assert table.labels().tolist() == [[7.0, 1.0, 2.0], [3.0, 4.0, -2.0]]
    assert table.calibration == {"kind": "raw"}


def test_hofstaetters_margins_are_those_of_the_mean(build: Any) -> None:
    np.testing.assert_allclose(build({"kind": "margin"}).labels(), [[6.0, 5.0], [-1.0, 5.0]], rtol=1e-6)


MINMAX_MEAN = [[1.0, (0 + 0 + 1 / 3) / 3, (0.5 + 0.5 + 0) / 3], [(1 / 3 + 1 + 1) / 3, (1 + 2 / 3 + 0.5) / 3, 0.0]]


def test_splade_v3s_ensemble_is_the_mean_of_per_query_minmax(build: Any) -> None:
    table = build({"calibration": {"kind": "minmax"}})  # arXiv 2403.06789

    # large 1 0 .5 | ⅓ 1 0, base 1 0 .5 | 1 ⅔ 0, albert 1 ⅓ 0 | 1 .5 0
    np.testing.assert_allclose(table.labels(), MINMAX_MEAN, rtol=1e-6)


def test_splade_v3s_rescored_ensemble_has_the_mean_and_deviation_of_its_reference(build: Any) -> None:
    labels = {"calibration": {"kind": "minmax"}, "rescale": {"kind": "affine", "reference": "base"}}

    table = build(labels)

    # base: 4 −2 1 3 2 0, mean 8/6, mean square 34/6
    mean, std = 8 / 6, math.sqrt(34 / 6 - (8 / 6) ** 2)
    ensemble = np.array(MINMAX_MEAN)
    expected = mean + std * (ensemble - ensemble.mean()) / ensemble.std()
    np.testing.assert_allclose(table.labels(), expected, rtol=1e-5)
    assert table.labels().mean() == pytest.approx(mean, rel=1e-5)
    assert table.labels().std() == pytest.approx(std, rel=1e-5)
    assert table.contract.rescale == {"kind": "affine", "reference": key_of(IDENTITIES["base"])}


def test_opensearchs_ensemble_is_thirty_times_the_mean_of_per_row_minmax(build: Any) -> None:
    table = build({"calibration": {"kind": "minmax", "scale": 30.0}})  # arXiv 2411.04403

    np.testing.assert_allclose(table.labels(), 30 * np.array(MINMAX_MEAN), rtol=1e-6)


# One calibration per teacher, weights, reference, rescale


def test_each_teacher_has_its_own_calibration_and_the_others_that_of_all(build: Any) -> None:
    labels = {"calibration": {"kind": "minmax", "scale": 2.0}, "calibrations": {"base": {"kind": "rank", "scale": 10.0}}}

    table = build(labels, large=LARGE, base=BASE)

    # large 2 0 1 | ⅔ 2 0, base by rank 10 0 5 | 10 5 0
    np.testing.assert_allclose(table.labels(), [[6.0, 0.0, 3.0], [16 / 3, 3.5, 0.0]], rtol=1e-6)
    assert table.calibration == {}
    assert [teacher["calibration"] for teacher in table.teachers] == [
        {"kind": "minmax", "scale": 2.0},
        {"kind": "rank", "scale": 10.0},
    ]
    assert ScoreTable.open(table.artifact.folder).contract == table.contract


def test_a_teacher_is_moved_to_the_mean_and_deviation_of_another(build: Any) -> None:
    labels = {"calibrations": {"base": {"kind": "affine", "reference": "large"}}, "weights": {"large": 0.0, "base": 1.0}}

    moved = build(labels, large=LARGE, base=BASE).labels()

    large, base = np.array([[8.0, 2.0, 5.0], [1.0, 9.0, -3.0]]), np.array([[4.0, -2.0, 1.0], [3.0, 2.0, 0.0]])
    np.testing.assert_allclose(moved, large.mean() + large.std() * (base - base.mean()) / base.std(), rtol=1e-5)


def test_the_reference_of_all_moves_to_where_it_stands(build: Any) -> None:
    labels = {"calibration": {"kind": "affine", "reference": "large"}}

    assert build(labels, large=LARGE).labels() == pytest.approx(np.array([[8.0, 2.0, 5.0], [1.0, 9.0, -3.0]]), rel=1e-6)


def test_a_sum_takes_weights_as_they_are(build: Any) -> None:
    table = build({"combine": "sum", "weights": {"large": 2.0, "base": 0.5}}, large=LARGE, base=BASE)

    assert table.labels().tolist() == [[18.0, 3.0, 10.5], [3.5, 19.0, -6.0]]
    assert [teacher["weight"] for teacher in table.teachers] == [2.0, 0.5]


def test_a_sum_of_weights_that_add_up_to_1_is_the_mean(build: Any, make_recipe: Any) -> None:
    weights = {"weights": {"large": 0.25, "base": 0.75}}

    tables = [build({**weights, "combine": combine}, large=LARGE, base=BASE) for combine in ("sum", "mean")]

    assert tables[0].key == tables[1].key


def test_combined_scores_are_rescaled_over_the_whole_table(build: Any) -> None:
    labels = build({"rescale": {"kind": "zscore", "scale": 16.0}}).labels()

    mixed = np.array([[7.0, 1.0, 2.0], [3.0, 4.0, -2.0]])
    np.testing.assert_allclose(labels, 16 * (mixed - mixed.mean()) / mixed.std(), rtol=1e-5)


# Rows and scores that a calibration is undefined for


def test_a_row_that_one_teacher_cannot_place_is_dropped_and_counted(build: Any) -> None:
    equal = {**BASE, "y": 4.0, "c": 4.0, "d": 4.0}

    table = build({"calibrations": {"base": {"kind": "minmax"}}}, large=LARGE, base=equal)

    assert [query_id for query_id, _, _ in table.rows()] == ["q0"]
    assert table.counts["rows_dropped"]["constant_scores"] == 1


def test_equal_scores_are_a_rank_of_one_half(build: Any) -> None:
    table = build({"calibration": {"kind": "rank"}}, large={**LARGE, "y": 4.0, "c": 4.0, "d": 4.0})

    assert table.labels().tolist() == [[1.0, 0.0, 0.5], [0.5, 0.5, 0.5]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            {"calibrations": {"base": {"kind": "zscore"}}},
            r"\[labels.calibrations.base\] kind = 'zscore', teacher 'base': all 6 scores of the teacher equal 4, ",
        ),
        (
            {"calibrations": {"large": {"kind": "affine", "reference": "base"}}},
            r"\[labels.calibrations.large\] kind = 'affine', teacher 'large': reference 'base': all 6 scores .* equal 4, ",
        ),
        (
            {"rescale": {"kind": "zscore"}, "weights": {"large": 0.0, "base": 1.0}},
            r"\[labels.rescale\] kind = 'zscore', combined gold_sim: all 6 scores of the teacher equal 4, ",
        ),
        (
            {"calibration": {"kind": "minmax"}, "calibrations": {"large": {"kind": "raw"}}},
            r"\[labels.calibration\] kind = 'minmax': all 2 rows have equal scores; check the teachers",
        ),
    ],
)
def test_scores_without_a_spread_are_refused_with_their_section(build: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(labels, large=LARGE, base=dict.fromkeys(BASE, 4.0))


# Pairs that one teacher has not scored


def without(scores: dict[str, float], *passages: str) -> dict[str, float]:
    return {passage: score for passage, score in scores.items() if passage not in passages}


def test_a_pair_that_one_teacher_has_not_scored_is_refused_by_default(build: Any) -> None:
    with pytest.raises(ValueError, match=r"1 of 6 pairs have no finite gold_sim by teacher 'base' .* query 'q1', passage 'd'"):
        build(large=LARGE, base=without(BASE, "d"))


def test_renormalize_shares_the_weight_of_a_missing_teacher_out(build: Any) -> None:
    labels = {"missing": "renormalize", "weights": {"large": 1.0, "base": 2.0, "albert": 1.0}}

    table = build(labels, large=LARGE, base=without(BASE, "a", "y"), albert=without(ALBERT, "y"))

    # q0: (8+8+9)/4, (2+3)/2 for a, (5+2+0)/4; q1: y by large alone, (9+4+1)/4, (−3+0−3)/4
    np.testing.assert_allclose(table.labels(), [[6.25, 2.5, 1.75], [1.0, 3.5, -1.5]], rtol=1e-6)
    assert table.summary["unscored"] == {"large": 0, "base": 2, "albert": 1}
    assert table.summary["raw_gold_sim"]["base"] == {"min": 0.0, "mean": 7 / 4, "max": 4.0}


def test_a_sum_with_a_missing_teacher_keeps_its_total_weight(build: Any) -> None:
    labels = {"missing": "renormalize", "combine": "sum", "weights": {"large": 1.0, "base": 2.0}}

    table = build(labels, large=LARGE, base=without(BASE, "a"))

    assert table.labels()[0].tolist() == pytest.approx([16.0, 3 * 2.0, 7.0])


def test_a_calibration_sees_the_scored_pairs_only(build: Any) -> None:
    labels = {"missing": "renormalize", "calibration": {"kind": "minmax"}}

    table = build(labels, large=LARGE, base=without(BASE, "a"))

    # base over x b: 1 0; a by large alone
    np.testing.assert_allclose(table.labels()[0], [1.0, 0.0, 0.25], rtol=1e-6)


def test_a_row_that_a_teacher_has_not_scored_at_all_is_labelled_by_the_others(build: Any) -> None:
    labels = {"missing": "renormalize", "calibration": {"kind": "minmax"}}

    table = build(labels, large=LARGE, base=without(BASE, "x", "a", "b"))

    np.testing.assert_allclose(table.labels()[0], [1.0, 0.0, 0.5], rtol=1e-6)


def test_a_pair_that_no_teacher_has_scored_is_refused_always(build: Any) -> None:
    message = (
        r"missing = \"renormalize\": 1 of 6 pairs have no score by any of \['large', 'base'\] "
        r"\(first: query 'q1', passage 'c'\); score them first: make teacher-scores"
    )
    with pytest.raises(ValueError, match=message):
        build({"missing": "renormalize"}, large=without(LARGE, "c", "a"), base=without(BASE, "c"))


def test_infinity_is_no_missing_score(build: Any) -> None:
    message = r"1 of 6 gold_sim by teacher 'base' are infinite \(first: query 'q0', passage 'b'\); expected finite numbers"

    with pytest.raises(ValueError, match=message):
        build({"missing": "renormalize"}, large=LARGE, base={**BASE, "b": -math.inf})


def test_a_single_teacher_must_have_scored_every_pair(build: Any) -> None:
    with pytest.raises(ValueError, match="1 of 6 pairs have no finite gold_sim by teacher 'large'"):
        build({"missing": "renormalize"}, large=without(LARGE, "c"))


# Keys


def test_one_calibration_said_in_two_ways_is_one_key(make_recipe: Any) -> None:
    minmax = {"kind": "minmax", "scale": 30.0}

    keys = keys_of(
        make_recipe,
        {"calibration": minmax},
        {"calibrations": {name: minmax for name in NAMES}},
        {"calibration": minmax, "calibrations": {"base": minmax}},
    )

    assert len(set(keys)) == 1


def test_views_that_differ_differ_in_their_keys(make_recipe: Any) -> None:
    affine = {"kind": "affine", "reference": "large"}
    views: list[dict[str, Any]] = [
        {},
        {"calibrations": {"base": {"kind": "minmax"}}},
        {"calibrations": {"large": {"kind": "minmax"}}},
        {"calibrations": {"base": affine}},
        {"calibrations": {"base": {**affine, "reference": "albert"}}},
        {"calibration": {"kind": "affine"}},
        {"calibration": affine},
        {"rescale": affine},
        {"rescale": {"kind": "zscore"}},
        {"rescale": {"kind": "zscore", "scale": 2.0}},
        {"combine": "sum"},
        {"missing": "renormalize"},
        {"calibration": {"kind": "rank"}},
        {"calibration": {"kind": "percentile"}},
    ]

    assert len(set(keys_of(make_recipe, *views))) == len(views)


def test_the_calibration_of_a_teacher_that_does_not_label_enters_no_key(make_recipe: Any) -> None:
    weights = {"weights": {"large": 1.0, "base": 1.0, "albert": 0.0}}
    ignored = {**weights, "calibrations": {"albert": {"kind": "minmax"}}}

    first, second = keys_of(make_recipe, weights, ignored)

    assert first == second


def test_a_reference_enters_the_key_by_identity_and_not_by_name(make_recipe: Any) -> None:
    labels = {"calibration": {"kind": "affine", "reference": "base"}, "weights": {"large": 1.0, "base": 0.0}}
    renamed = {"calibration": {"kind": "affine", "reference": "other"}, "weights": {"large": 1.0, "other": 0.0}}
    recipes = make_recipe(labels, teachers=("large", "base")), make_recipe(renamed, teachers=("large", "other"))
    identities = {**IDENTITIES, "other": IDENTITIES["base"]}

    first, second = (key_of(table_fields(recipe, "c", identities)) for recipe in recipes)
    retrained = key_of(table_fields(recipes[0], "c", {**identities, "base": {"weights": "new"}}))

    assert first == second != retrained
