from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from sparsekd.artifact import key_of
from sparsekd.labels.building import build_table, scored_teachers, table_fields, table_folder, teacher_weights
from sparsekd.labels.rows import choose_rows
from sparsekd.labels.score_table import ScoreTable
from sparsekd.labels.vectors import vocabulary_digest

IDENTITIES = {"judge": {"weights": "j"}, "second": {"weights": "s"}}
JUDGE = {"x": 8.0, "y": 1.0, "a": 2.0, "b": 5.0, "c": 9.0, "d": -3.0}
SECOND = {"x": 0.5, "y": 0.1, "a": 0.3, "b": 0.1, "c": 0.1, "d": 0.3}
BOTH = ("judge", "second")


def sparse_recipe(make_recipe: Any, **labels: Any) -> Any:
    """A recipe whose teacher ``judge`` gives vectors, beside a cross-encoder ``second``."""
    teachers = [
        {"name": "judge", "kind": "sparse", "model": "models/judge"},
        {"name": "second", "kind": "cross-encoder", "model": "models/second"},
    ]
    section = {"kind": "embedding", "num_negatives": 2, **labels}
    return make_recipe(section, teachers=teachers, training={"loss": "SparseMSELoss"})


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


def test_triplets_are_one_row_per_negative_with_the_labels_of_the_list(build: Any) -> None:
    scores, differences = (build({"kind": kind, "layout": "triplets"}, name=kind) for kind in ("score_list", "margin"))

    ids = [("q0", ["x", "a"]), ("q0", ["x", "b"]), ("q1", ["y", "c"]), ("q1", ["y", "d"])]
    assert [(query_id, passages) for query_id, passages, _ in scores.rows()] == ids
    assert scores.labels().tolist() == [[8.0, 2.0], [8.0, 5.0], [1.0, 9.0], [1.0, -3.0]]
    assert [(query_id, passages) for query_id, passages, _ in differences.rows()] == ids
    assert differences.labels().tolist() == [[6.0], [3.0], [-8.0], [4.0]]
    assert (scores.num_passages, scores.counts["rows"]) == (2, 4)


def test_triplets_are_calibrated_as_whole_lists(build: Any) -> None:
    table = build({"calibration": {"kind": "minmax", "scale": 30.0}, "layout": "triplets"})

    assert table.labels().tolist() == [[30.0, 0.0], [30.0, 15.0], [10.0, 30.0], [10.0, 0.0]]


@pytest.mark.parametrize(("num_negatives", "ids"), [(0, [["x"], ["y"]]), (2, [["x", "a", "b"], ["y", "c", "d"]])])
def test_rows_without_labels_ask_no_teacher(
    tmp_path: Path, make_recipe: Any, candidate_row: Any, num_negatives: int, ids: list[list[str]]
) -> None:
    recipe = make_recipe({"kind": "none", "num_negatives": num_negatives})
    rows = choose_rows(recipe, [candidate_row("q0", "x", bm25="ab"), candidate_row("q1", "y", bm25="cd")])

    table = build_table(recipe, rows, cache=tmp_path, fields=table_fields(recipe, "c", {}))

    assert [passages for _, passages, _ in table.rows()] == ids
    assert (table.kind, table.teachers, table.label_column) == ("none", [], None)
    assert table.artifact.manifest["teachers"] == {}
    assert table.summary == {"queries": 2, "passages": sum(map(len, ids))}


def test_bare_rows_become_triplets_too(tmp_path: Path, make_recipe: Any, candidate_row: Any) -> None:
    recipe = make_recipe({"kind": "none", "layout": "triplets"})
    rows = choose_rows(recipe, [candidate_row("q0", "x", bm25="ab")])

    table = build_table(recipe, rows, cache=tmp_path, fields=table_fields(recipe, "c", {}))

    assert list(table.rows()) == [("q0", ["x", "a"], []), ("q0", ["x", "b"], [])]


def test_similarities_are_pairs_on_one_scale_from_0_to_1(build: Any) -> None:
    table = build({"kind": "similarity"})

    # 8 2 5 and 1 9 -3, moved by −3..9
    assert [(query_id, *passages) for query_id, passages, _ in table.rows()] == [
        ("q0", "x"), ("q0", "a"), ("q0", "b"), ("q1", "y"), ("q1", "c"), ("q1", "d")
    ]  # fmt: skip
    np.testing.assert_allclose(table.labels()[:, 0], [11 / 12, 5 / 12, 8 / 12, 4 / 12, 1.0, 0.0], rtol=1e-6)
    assert table.contract.label_range == (-3.0, 9.0)
    assert table.summary["range"] == {"min": -3.0, "max": 9.0}
    assert table.summary["similarity"]["mean"] == pytest.approx(40 / 72)
    assert table.counts["rows"] == 6


def test_a_pair_that_two_positives_share_is_one_row(
    tmp_path: Path, make_recipe: Any, candidate_row: Any, known_scores: Any
) -> None:
    recipe = make_recipe({"kind": "similarity"})
    rows = choose_rows(recipe, [candidate_row("q0", "xy", bm25="ab")])
    gold_sim = known_scores({"judge": {("q0", passage): score for passage, score in JUDGE.items()}})

    table = build_table(recipe, rows, cache=tmp_path, fields=table_fields(recipe, "c", IDENTITIES), gold_sim=gold_sim)

    assert [passages for _, passages, _ in table.rows()] == [["x"], ["a"], ["b"], ["y"]]
    assert table.counts["rows_dropped"]["duplicate_pairs"] == 2


def test_similarities_without_a_range_are_refused(build: Any) -> None:
    with pytest.raises(ValueError, match=r"kind = 'similarity': all 6 combined gold_sim equal 4, .*; check the teachers"):
        build({"kind": "similarity"}, judge=dict.fromkeys(JUDGE, 4.0))


@pytest.mark.parametrize("kind", ["score_list", "similarity", "embedding"])
def test_labels_that_nobody_gives_are_refused(tmp_path: Path, make_recipe: Any, candidate_row: Any, kind: str) -> None:
    recipe = sparse_recipe(make_recipe) if kind == "embedding" else make_recipe({"kind": kind})
    rows = choose_rows(recipe, [candidate_row("q0", "x", bm25="ab")])

    with pytest.raises(ValueError, match=f"kind = '{kind}' needs .*; none were given"):
        build_table(recipe, rows, cache=tmp_path, fields=table_fields(recipe, "c", IDENTITIES))


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


class KnownVectors:
    """A VectorSource over {text_id: vector}."""

    vocabulary: dict[str, int] | None = {"cat": 0, "dog": 1, "fish": 2}  # noqa: RUF012

    def __init__(self, vectors: dict[str, list[float]]) -> None:
        self._vectors = vectors

    def vectors(self, role: str, text_ids: Sequence[str]) -> scipy.sparse.csr_matrix:
        rows = [self._vectors[text_id] for text_id in text_ids]
        return scipy.sparse.csr_matrix(np.array(rows, dtype=np.float32).reshape(-1, 3))


VECTORS = {"q0": [1, 0, 0], "q1": [0, 0, 2], "x": [0, 1, 3], "y": [0.5, 0, 0], "a": [0, 0, 0], "b": [1, 1, 1], "c": [0, 7, 0]}


def test_vectors_label_every_query_and_passage_of_the_rows_once(tmp_path: Path, make_recipe: Any, candidate_row: Any) -> None:
    recipe = sparse_recipe(make_recipe)
    rows = choose_rows(recipe, [candidate_row("q0", "xy", bm25="ab"), candidate_row("q1", "x", bm25="bc")])
    fields = table_fields(recipe, "c", IDENTITIES)

    table = build_table(recipe, rows, cache=tmp_path, fields=fields, vectors=KnownVectors(VECTORS))

    assert table.texts() == {"query": ["q0", "q1"], "passage": ["x", "b", "y", "c"]}
    assert table.vectors().toarray().tolist() == [VECTORS[text_id] for text_id in ("q0", "q1", "x", "b", "y", "c")]
    assert table.counts["rows"] == 6
    assert table.counts["rows_dropped"] == {"too_few_negatives": 0, "empty_vectors": 1}  # a
    assert table.contract.vocabulary == vocabulary_digest({"fish": 2, "cat": 0, "dog": 1})
    assert table.teachers == [{"identity": key_of(IDENTITIES["judge"]), "weight": 1.0}]
    assert table.summary == {
        "dimension": 3,
        "texts": {"query": 2, "passage": 4},
        "active_dims": {"query": 1.0, "passage": 7 / 4},
        "weights": {"min": 0.5, "max": 7.0},
    }


def test_vectors_are_cut_into_shards(
    tmp_path: Path, make_recipe: Any, candidate_row: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = sparse_recipe(make_recipe)
    rows = choose_rows(recipe, [candidate_row("q0", "x", bm25="bc")])
    fields = table_fields(recipe, "c", IDENTITIES)
    for module in ("building", "vectors"):
        monkeypatch.setattr(f"sparsekd.labels.{module}.ROWS_PER_SHARD", 3)

    table = build_table(recipe, rows, cache=tmp_path, fields=fields, vectors=KnownVectors(VECTORS))

    assert list(table.artifact.manifest["shards"].values()) == [3, 1]
    assert table.vectors().toarray().tolist() == [VECTORS[text_id] for text_id in ("q0", "x", "b", "c")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [0, float("nan"), 0]}, "the teacher's vector of passage 'x' is not finite; check the teacher"),
        ({text_id: [0, 0, 0] for text_id in VECTORS}, "the teacher's vectors of all 4 texts are empty; check the teacher"),
    ],
)
def test_vectors_that_teach_nonsense_are_refused(
    tmp_path: Path, make_recipe: Any, candidate_row: Any, change: dict[str, list[float]], message: str
) -> None:
    recipe = sparse_recipe(make_recipe)
    rows = choose_rows(recipe, [candidate_row("q0", "x", bm25="bc")])

    with pytest.raises(ValueError, match=message):
        build_table(
            recipe,
            rows,
            cache=tmp_path,
            fields=table_fields(recipe, "c", IDENTITIES),
            vectors=KnownVectors({**VECTORS, **change}),
        )
    assert not list(tmp_path.iterdir())


def test_vectors_come_from_the_sparse_teacher_whatever_the_others_weigh(make_recipe: Any) -> None:
    for weights in ({}, {"judge": 1.0, "second": 3.0}):
        assert teacher_weights(sparse_recipe(make_recipe, weights=weights)) == {"judge": 1.0}


def test_teachers_score_candidates_where_scores_label_or_filter(make_recipe: Any) -> None:
    by_second = {"by": "second", "absolute_margin": 1.0}

    assert scored_teachers(make_recipe({"weights": {"judge": 1.0, "second": 0.0}}, teachers=BOTH)) == [*BOTH]
    assert scored_teachers(make_recipe({"kind": "similarity"}, teachers=BOTH)) == [*BOTH]
    assert scored_teachers(make_recipe({"kind": "none"}, teachers=BOTH)) == []
    assert scored_teachers(make_recipe({"kind": "none"}, by_second, BOTH)) == ["second"]
    assert scored_teachers(sparse_recipe(make_recipe)) == []


RANDOM = {"selection": "random", "seed": 1}
BY_JUDGE = {"by": "judge", "absolute_margin": 1.0}


@pytest.mark.parametrize(
    ("labels", "negative_filter"),
    [
        ({"num_negatives": 3}, {}),
        ({"kind": "margin"}, {}),
        ({"kind": "none"}, {}),
        ({"kind": "similarity"}, {}),
        ({"layout": "triplets"}, {}),
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


@pytest.mark.parametrize(
    ("labels", "changes"),
    [
        # nothing of a teacher acts on bare rows
        ({"kind": "none"}, [{"calibration": {"kind": "minmax"}}, {"weights": {"judge": 3.0, "second": 1.0}}]),
        ({"num_negatives": 1}, [{"layout": "triplets"}]),  # a row of one negative is a triplet
    ],
)
def test_settings_that_do_not_act_on_a_kind_keep_its_key(make_recipe: Any, labels: Any, changes: list[Any]) -> None:
    key = key_of(table_fields(make_recipe(labels, teachers=BOTH), "c", IDENTITIES))

    for change in changes:
        assert key_of(table_fields(make_recipe({**labels, **change}, teachers=BOTH), "c", IDENTITIES)) == key


def test_an_embedding_table_depends_on_its_teacher_and_no_calibration(make_recipe: Any) -> None:
    key = key_of(table_fields(sparse_recipe(make_recipe), "c", IDENTITIES))

    assert key_of(table_fields(sparse_recipe(make_recipe, calibration={"kind": "zscore"}), "c", IDENTITIES)) == key
    assert key_of(table_fields(sparse_recipe(make_recipe), "c", {**IDENTITIES, "second": {"weights": "other"}})) == key
    assert key_of(table_fields(sparse_recipe(make_recipe), "c", {**IDENTITIES, "judge": {"weights": "other"}})) != key


def test_other_candidates_or_another_teacher_change_the_key_and_another_name_does_not(make_recipe: Any) -> None:
    key = key_of(table_fields(make_recipe(), "c", IDENTITIES))

    assert key_of(table_fields(make_recipe(), "other", IDENTITIES)) != key
    assert key_of(table_fields(make_recipe(), "c", {"judge": {"weights": "other"}})) != key
    assert key_of(table_fields(make_recipe(teachers=("renamed",)), "c", {"renamed": IDENTITIES["judge"]})) == key


def test_the_folder_is_named_by_the_key(build: Any, tmp_path: Path) -> None:
    table = build()

    assert table.artifact.folder == table_folder(tmp_path / "cache", table.artifact.manifest["fields"])
    assert table.artifact.folder.name == table.key
