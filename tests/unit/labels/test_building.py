from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.artifact import key_of
from sparsekd.labels.building import build_table, table_fields, table_folder, teacher_weights
from sparsekd.labels.rows import choose_rows
from sparsekd.labels.score_table import ScoreTable

IDENTITIES = {"judge": {"weights": "j"}, "second": {"weights": "s"}}
JUDGE = {"x": 8.0, "y": 1.0, "a": 2.0, "b": 5.0, "c": 9.0, "d": -3.0}
SECOND = {"x": 0.5, "y": 0.1, "a": 0.3, "b": 0.1, "c": 0.1, "d": 0.3}
BOTH = ("judge", "second")


@pytest.fixture
def build(tmp_path: Path, make_recipe: Any, candidate_row: Any, known_scores: Any) -> Callable[..., ScoreTable]:
    """Return ``build(labels, teachers=..., judge=...)`` over q0: x | a b and q1: y | c d."""

    def make(
        labels: dict[str, Any] | None = None,
        *,
        teachers: tuple[str, ...] = ("judge",),
        judge: dict[str, float] = JUDGE,
        second: dict[str, float] = SECOND,
        name: str = "cache",
    ) -> ScoreTable:
        recipe = make_recipe(labels, teachers=teachers)
        rows = choose_rows(recipe, [candidate_row("q0", "x", bm25="ab"), candidate_row("q1", "y", bm25="cd")])
        by_teacher = {"judge": judge, "second": second}
        gold_sim = known_scores(
            {teacher: {(query, passage): score for query in ("q0", "q1") for passage, score in scores.items()}
             for teacher, scores in by_teacher.items()}
        )  # fmt: skip
        fields = table_fields(recipe, "candidates-key", IDENTITIES)
        return build_table(
            recipe, rows, cache=tmp_path / name, fields=fields, gold_sim=gold_sim, counts={"pairs": 6}, extra={"command": "x"}
        )

    return make


def test_a_score_list_holds_raw_scores_positive_first(build: Any) -> None:
    table = build()

    assert list(table.rows()) == [("q0", ["x", "a", "b"], [8.0, 2.0, 5.0]), ("q1", ["y", "c", "d"], [1.0, 9.0, -3.0])]
    assert (table.kind, table.label_column, table.num_passages, len(table)) == ("score_list", "gold_sim", 3, 2)


def test_margins_are_signed_positive_minus_negative(build: Any) -> None:
    table = build({"kind": "margin"})

    assert [labels for _, _, labels in table.rows()] == [[6.0, 3.0], [-8.0, 4.0]]
    assert (table.kind, table.label_column, table.num_passages) == ("margin", "margin", 3)


def test_opensearchs_ensemble_by_hand(build: Any) -> None:
    table = build({"calibration": {"kind": "minmax", "scale": 30.0}}, teachers=BOTH)

    # judge:  8 2 5 -> 30 0 15, 1 9 -3 -> 10 30 0; second: .5 .3 .1 -> 30 15 0, .1 .1 .3 -> 0 0 30
    np.testing.assert_allclose(table.labels(), [[30.0, 7.5, 7.5], [5.0, 15.0, 15.0]], rtol=1e-5)


def test_weights_are_shares_and_margins_follow_the_combined_scores(build: Any) -> None:
    table = build({"kind": "margin", "weights": {"judge": 3.0, "second": 1.0}}, teachers=BOTH)

    expected = [[0.75 * 6 + 0.25 * 0.2, 0.75 * 3 + 0.25 * 0.4], [0.75 * -8 + 0.25 * 0.0, 0.75 * 4 + 0.25 * -0.2]]
    np.testing.assert_allclose(table.labels(), expected, rtol=1e-5)


def test_a_teacher_of_weight_zero_is_not_asked_and_not_in_the_key(
    tmp_path: Path, make_recipe: Any, candidate_row: Any, known_scores: Any
) -> None:
    recipe = make_recipe({"weights": {"judge": 1.0, "second": 0.0}}, teachers=BOTH)
    gold_sim = known_scores({"judge": {("q0", passage): score for passage, score in JUDGE.items()}})
    rows = choose_rows(recipe, [candidate_row("q0", "x", bm25="ab")])
    fields = table_fields(recipe, "c", IDENTITIES)

    table = build_table(recipe, rows, cache=tmp_path, fields=fields, gold_sim=gold_sim)

    assert gold_sim.asked == ["judge"]
    assert teacher_weights(recipe) == {"judge": 1.0}
    assert table.key == key_of(table_fields(make_recipe(), "c", IDENTITIES))


def test_zscore_uses_the_statistics_of_the_tables_rows(build: Any) -> None:
    labels = build({"calibration": {"kind": "zscore", "scale": 2.0}}).labels()

    assert labels.mean() == pytest.approx(0.0, abs=1e-6)
    assert labels.std() == pytest.approx(2.0, rel=1e-5)


def test_a_row_of_equal_scores_is_dropped_and_counted_under_minmax_only(build: Any) -> None:
    equal = {**JUDGE, "y": 4.0, "c": 4.0, "d": 4.0}

    table = build({"calibration": {"kind": "minmax"}}, judge=equal)

    assert [query_id for query_id, _, _ in table.rows()] == ["q0"]
    assert table.counts["rows_dropped"] == {"too_few_negatives": 0, "constant_scores": 1}
    assert len(build(judge=equal, name="raw")) == 2


def test_all_rows_equal_is_refused(build: Any) -> None:
    equal = dict.fromkeys(JUDGE, 4.0)

    with pytest.raises(ValueError, match="kind = 'minmax': all 2 rows have equal scores; check the teachers"):
        build({"calibration": {"kind": "minmax"}}, judge=equal)
    with pytest.raises(ValueError, match=r"kind = 'zscore', teacher 'judge': all 6 scores of the teacher equal 4"):
        build({"calibration": {"kind": "zscore"}}, judge=equal)


@pytest.mark.parametrize("missing", ["x", "d"])
def test_a_score_the_bank_lacks_is_refused_by_pair_and_publishes_nothing(build: Any, tmp_path: Path, missing: str) -> None:
    query_id = "q0" if missing == "x" else "q1"
    known = {passage: score for passage, score in JUDGE.items() if passage != missing}

    message = (
        rf"1 of 6 pairs have no finite gold_sim by teacher 'judge' \(first: query '{query_id}', passage '{missing}'\); score"
    )
    with pytest.raises(ValueError, match=message):
        build(judge=known)
    assert not (tmp_path / "cache").exists()


def test_labels_beyond_float32_are_refused(build: Any) -> None:
    with pytest.raises(ValueError, match="leave the range of float32; lower the calibration's scale"):
        build({"calibration": {"kind": "minmax", "scale": 1e39}})


def test_the_manifest_tells_counts_and_what_catches_a_broken_teacher(build: Any) -> None:
    table = build(teachers=BOTH, labels={"weights": {"judge": 1.0, "second": 0.0}})

    assert table.counts == {
        "pairs": 6,
        "rows": 2,
        "rows_dropped": {"too_few_negatives": 0, "constant_scores": 0},
        "candidates_dropped_filter": 0,
    }
    assert table.summary["gold_sim"] == {"min": -3.0, "mean": pytest.approx(22 / 6), "max": 9.0}
    assert table.summary["raw_gold_sim"] == {"judge": table.summary["gold_sim"]}
    assert table.summary["share_positive_below_best_negative"] == 0.5
    assert table.summary["margin_quantiles"]["p50"] == pytest.approx(3.5)  # of −8 3 4 6
    assert list(table.summary["margin_quantiles"]) == ["p1", "p10", "p50", "p90", "p99"]
    assert table.artifact.manifest["teachers"] == {"judge": 1.0}
    assert table.artifact.manifest["command"] == "x"


def test_the_summary_of_margins_is_of_margins(build: Any) -> None:
    assert build({"kind": "margin"}).summary["margin"] == {"min": -8.0, "mean": 1.25, "max": 6.0}


def test_building_twice_gives_equal_bytes_whatever_the_teachers_are_called(build: Any) -> None:
    first, second = build(name="first"), build(name="second")

    assert first.artifact.manifest == second.artifact.manifest
    assert b"judge" not in b"".join(path.read_bytes() for path in first.shard_paths)


def test_rows_are_cut_into_shards(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(build(name="whole").rows())
    monkeypatch.setattr("sparsekd.labels.building.ROWS_PER_SHARD", 1)

    table = build(name="cut")

    assert [path.name for path in table.shard_paths] == [
        "score-table-00000-of-00002.arrow",
        "score-table-00001-of-00002.arrow",
    ]
    assert list(table.rows()) == whole


RANDOM = {"selection": "random", "seed": 1}
BY_JUDGE = {"by": "judge", "absolute_margin": 1.0}


@pytest.mark.parametrize(
    ("labels", "negative_filter"),
    [
        ({"num_negatives": 3}, {}),
        ({"kind": "margin"}, {}),
        (RANDOM, {}),
        ({**RANDOM, "seed": 2}, {}),
        ({"calibration": {"kind": "minmax"}}, {}),
        ({"calibration": {"kind": "minmax", "scale": 30.0}}, {}),
        ({"weights": {"judge": 2.0, "second": 1.0}}, {}),
        ({}, BY_JUDGE),
        ({}, {**BY_JUDGE, "absolute_margin": 2.0}),
        ({}, {**BY_JUDGE, "by": "second"}),
    ],
)
def test_what_changes_the_table_changes_its_key(make_recipe: Any, labels: Any, negative_filter: Any) -> None:
    changed = key_of(table_fields(make_recipe(labels, negative_filter, BOTH), "c", IDENTITIES))
    others = [
        key_of(table_fields(make_recipe(teachers=BOTH), "c", IDENTITIES)),
        key_of(table_fields(make_recipe(RANDOM | {"seed": 3}, teachers=BOTH), "c", IDENTITIES)),
        key_of(table_fields(make_recipe({}, {**BY_JUDGE, "absolute_margin": 3.0}, BOTH), "c", IDENTITIES)),
    ]

    assert changed not in others


@pytest.mark.parametrize(
    ("labels", "negative_filter", "sections"),
    [
        ({"seed": 9}, {}, {}),  # top draws nothing
        ({"calibration": {"kind": "raw", "scale": 9.0}}, {}, {}),
        ({"weights": {"judge": 2.0, "second": 2.0}}, {}, {}),
        ({}, {"by": "judge"}, {}),
        ({}, {"absolute_margin": 1.0}, {}),  # by miner: in the candidates' key
        ({}, {}, {"training": {"loss": "SparseMarginMSELoss", "temperature": 9.0, "seed": 9}}),
        ({}, {}, {"run": {"device": "cuda"}}),
    ],
)
def test_what_does_not_change_the_table_keeps_its_key(
    make_recipe: Any, labels: Any, negative_filter: Any, sections: Any
) -> None:
    same = table_fields(make_recipe(labels, negative_filter, BOTH, **sections), "c", IDENTITIES)

    assert same == table_fields(make_recipe(teachers=BOTH), "c", IDENTITIES)


def test_other_candidates_or_another_teacher_change_the_key_and_another_name_does_not(make_recipe: Any) -> None:
    key = key_of(table_fields(make_recipe(), "c", IDENTITIES))

    assert key_of(table_fields(make_recipe(), "other", IDENTITIES)) != key
    assert key_of(table_fields(make_recipe(), "c", {"judge": {"weights": "other"}})) != key
    assert key_of(table_fields(make_recipe(teachers=("renamed",)), "c", {"renamed": IDENTITIES["judge"]})) == key


def test_the_folder_is_named_by_the_key(build: Any, tmp_path: Path) -> None:
    table = build()

    assert table.artifact.folder == table_folder(tmp_path / "cache", table.artifact.manifest["fields"])
    assert table.artifact.folder.name == table.key
