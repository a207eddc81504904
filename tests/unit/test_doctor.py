"""The score doctor's page: its facts of a table made by hand, when it is found or made again, and what it says. No torch."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsekd.artifact import IntegrityError, key_of, publish
from sparsekd.bank.text_key import text_keys
from sparsekd.doctor import described_facts, doctor_fields, examined, lists_of, suggested_calibration, table_facts
from sparsekd.labels.building import build_table, table_fields
from sparsekd.labels.rows import choose_rows
from sparsekd.labels.score_table import ScoreTable
from sparsekd.mining.candidates import CandidateRow
from sparsekd.plan import Plan
from sparsekd.recipe import Recipe

IDENTITIES = {"judge": {"weights": "j"}, "second": {"weights": "s"}}
# q0: x y | a b, and q1: z | c d; the two positives of q0 share its negatives
CANDIDATES = [
    CandidateRow("q0", ["x", "y"], ["a", "b"], ["bm25"] * 2, [1.0, 1.0], [1, 2]),
    CandidateRow("q1", ["z"], ["c", "d"], ["bm25"] * 2, [1.0, 1.0], [1, 2]),
]
LISTS = [("q0", ["x", "a", "b"]), ("q0", ["y", "a", "b"]), ("q1", ["z", "c", "d"])]
JUDGE = {"x": 4.0, "y": 1.0, "a": 2.0, "b": 0.0, "z": 4.0, "c": 4.0, "d": 4.0}
SECOND = {"x": 0.9, "y": 0.1, "a": 0.2, "b": 0.3, "z": 0.3, "c": 0.2, "d": 0.1}


def gold_sim(teacher: str, query_ids: Sequence[str], passage_ids: Sequence[str]) -> NDArray[np.float32]:
    known = {"judge": JUDGE, "second": SECOND}[teacher]
    return np.array([known[passage_id] for passage_id in passage_ids], dtype=np.float32)


def recipe_of(labels: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    document: dict[str, Any] = {
        "collection": {"path": "somewhere"},
        "mining": {"miners": [{"kind": "bm25", "quota": 2}]},
        "teachers": [{"name": name, "kind": "cross-encoder", "model": f"models/{name}"} for name in IDENTITIES],
        "labels": {"num_negatives": 2, **(labels or {})},
        "student": {"model": "some/student"},
    }
    return Recipe.model_validate({**document, **sections})


@pytest.fixture
def build(tmp_path: Path) -> Callable[[Recipe], ScoreTable]:
    def make(recipe: Recipe) -> ScoreTable:
        counts = {"mining": {"proposed": 10, "kept": 4, "dropped_filter": 1, "dropped_over_quota": 5}}
        fields, rows = table_fields(recipe, "c", IDENTITIES), choose_rows(recipe, CANDIDATES)
        return build_table(recipe, rows, cache=tmp_path / "cache", fields=fields, gold_sim=gold_sim, counts=counts)

    return make


# Facts


@pytest.mark.parametrize(
    ("labels", "loss"),
    [
        ({}, "SparseMarginMSELoss"),
        ({"layout": "triplets"}, "SparseMarginMSELoss"),
        ({"kind": "margin"}, "SparseMarginMSELoss"),
        ({"kind": "margin", "layout": "triplets"}, "SparseMarginMSELoss"),
        ({"kind": "similarity"}, "SparseCoSENTLoss"),
    ],
)
def test_the_rows_of_every_kind_and_layout_are_those_that_were_chosen(build: Any, labels: Any, loss: str) -> None:
    table = build(recipe_of(labels, training={"loss": loss}))

    assert list(lists_of(table)) == LISTS


def test_the_page_by_hand(build: Any) -> None:
    recipe = recipe_of({"weights": {"judge": 1.0, "second": 0.0}}, training={"temperature": 2.0})
    table = build(recipe)

    facts = table_facts(recipe, table, gold_sim, None)

    assert (facts["rows"], facts["passages_per_row"], facts["queries"]) == (3, 3, 2)
    judge, second = facts["teachers"]["judge"], facts["teachers"]["second"]
    assert (judge["weight"], second["weight"]) == (1.0, 0.0)
    assert (judge["pairs"], judge["unscored"], judge["constant_rows"], second["constant_rows"]) == (7, 0, 1, 0)
    assert judge["saturation"] == {"share_at_min": pytest.approx(1 / 7), "share_at_max": pytest.approx(4 / 7), "distinct_values": 4}
    assert judge["share_positive_below_best_negative"] == pytest.approx(1 / 3)  # y below a
    assert second["share_positive_below_best_negative"] == pytest.approx(1 / 3)
    # q0 over x y a b: judge 4 1 2 0, second .9 .1 .2 .3; x above all, y−a alike, a−b and y−b against: (4 − 2) / 6. q1: judge ties
    [agreement] = facts["agreement"]
    assert agreement["teachers"] == ["judge", "second"]
    assert (agreement["queries"], agreement["queries_undefined"]) == (1, 1)
    assert agreement["kendall_tau"]["mean"] == pytest.approx(1 / 3)
    assert facts["labels"] == table.summary
    assert facts["dropped"]["mining"]["dropped_over_quota"] == {"count": 5, "share": 0.5}


def test_the_softmax_is_taken_at_kls_temperature(build: Any) -> None:
    recipe = recipe_of({"weights": {"judge": 1.0, "second": 0.0}}, training={"temperature": 0.5})

    softmax = table_facts(recipe, build(recipe), gold_sim, None)["softmax"]

    def entropy(scores: list[float]) -> float:
        powers = [math.exp(score / 0.5) for score in scores]
        return -sum(power / sum(powers) * math.log(power / sum(powers)) for power in powers)

    entropies = [entropy([4.0, 2.0, 0.0]), entropy([1.0, 2.0, 0.0]), math.log(3)]
    assert softmax["entropy"] == pytest.approx(sum(entropies) / 3)
    assert softmax["effective_support"] == pytest.approx(sum(map(math.exp, entropies)) / 3)
    assert (softmax["temperature"], softmax["passages"]) == (0.5, 3)


def test_no_softmax_without_kl(build: Any) -> None:
    recipe = recipe_of({"kind": "margin"}, training={"loss": "SparseMarginMSELoss"})

    assert table_facts(recipe, build(recipe), gold_sim, None)["softmax"] is None


def test_a_calibration_is_suggested_by_the_students_spread() -> None:
    one, several = (suggested_calibration(12.96, num_teachers=number) for number in (1, 2))
    unknown = suggested_calibration(None, num_teachers=1)

    assert one["set"] == '[labels.calibration] kind = "zscore", scale = 13 or above'
    assert several["set"] == '[labels.rescale] kind = "zscore", scale = 13 or above'
    assert unknown["set"] is None
    assert unknown["how"] == (
        '[labels.calibration] kind = "zscore" takes as scale the standard deviation of the student\'s dot products, which is not '
        "known yet: run pipeline/evaluate.py once, which ranks by the untrained student, and this page says it; "
        'or set [training] label_scale = "student"'
    )


def test_the_page_in_lines(build: Any) -> None:
    recipe = recipe_of({"weights": {"judge": 3.0, "second": 1.0}})

    lines = list(described_facts(table_facts(recipe, build(recipe), gold_sim, 13.0)))

    assert lines[0] == "3 rows of 3 passages, 2 queries"
    assert lines[1] == (
        "teacher judge (weight 0.75): 7 pairs; gold_sim 0..4, mean 2.71, std 1.58; 14.3% at the lowest, 57.1% at the highest of 4 "
        "values; 1 of 3 rows constant; positive below its best negative in 33.3% of rows"
    )
    assert lines[3] == "judge and second: Kendall tau mean 0.33, p10 0.33, p90 0.33 over 1 queries, 1 undefined"
    # −.775 .025 .05 .7 1.675 3.15
    assert lines[4] == (
        "margins of the labels: p1 -0.735, p10 -0.375, p50 0.375, p90 2.41, p99 3.08; positive below its best negative in 33.3% of "
        "rows"
    )
    assert lines[5] == "dropped: filter 1 (10.0%), over_quota 5 (50.0%)"
    assert lines[6].startswith('[labels.rescale] kind = "zscore", scale = 13 or above: labels then spread as the untrained student')


def test_a_bank_that_has_lost_its_scores_is_said(build: Any) -> None:
    def empty(teacher: str, query_ids: Sequence[str], passage_ids: Sequence[str]) -> NDArray[np.float32]:
        return np.full(len(passage_ids), np.nan, dtype=np.float32)

    lines = list(described_facts(table_facts(recipe_of(), build(recipe_of()), empty, None)))

    assert lines[1] == "teacher judge (weight 0.5): none of 7 pairs scored"
    assert lines[3] == "judge and second: Kendall tau undefined over 0 queries, 2 undefined"


# Keys


def test_what_changes_the_page_changes_its_key() -> None:
    kl, margin = recipe_of(), recipe_of(training={"loss": "SparseMarginMSELoss"})
    keys = [
        key_of(doctor_fields(kl, "t", IDENTITIES, None)),
        key_of(doctor_fields(kl, "other", IDENTITIES, None)),
        key_of(doctor_fields(kl, "t", {**IDENTITIES, "second": {"weights": "other"}}, None)),
        key_of(doctor_fields(kl, "t", IDENTITIES, "a run")),
        key_of(doctor_fields(recipe_of(training={"temperature": 1.0}), "t", IDENTITIES, None)),
        key_of(doctor_fields(margin, "t", IDENTITIES, None)),
    ]

    assert len(set(keys)) == len(keys)


def test_what_does_not_change_the_page_keeps_its_key() -> None:
    other = recipe_of(training={"seed": 9, "batch_size": 4}, run={"device": "cuda"})

    assert doctor_fields(other, "t", IDENTITIES, None) == doctor_fields(recipe_of(), "t", IDENTITIES, None)


# Found or made, over the sample collection and a bank


class Place:
    """A plan over the sample collection by a BM25 teacher, whose scores are banked by hand, and its table."""

    def __init__(self, folder: Path, sample_folder: Path) -> None:
        self.folder, self.sample_folder = folder, sample_folder
        self.plan = self.plan_of()
        self.query_ids = list(self.plan.collection.queries)[:2]
        self.passage_ids = list(self.plan.collection.passages)[:6]
        self.bank([5.0, 1.0, 2.0, 3.0, 6.0, 4.0])

    def plan_of(self, **sections: Any) -> Plan:
        document: dict[str, Any] = {
            "collection": {"path": str(self.sample_folder)},
            "run": {"cache": str(self.folder / "cache")},
            "teachers": [{"name": "lexical", "kind": "bm25"}],
            **sections,
        }
        return Plan(recipe_of(**document))

    def bank(self, scores: list[float]) -> None:
        from sparsekd.bank.scores import ScoreBank

        collection = self.plan.collection
        queries = text_keys(collection.queries[query_id] for query_id in self.query_ids for _ in range(3))
        passages = text_keys(collection.passages[passage_id] for passage_id in self.passage_ids)
        bank = ScoreBank(self.plan.cache / "bank").open(self.plan.teacher_identities["lexical"])
        bank.append(queries, passages, np.array(scores, dtype=np.float32))

    def table(self, plan: Plan | None = None) -> ScoreTable:
        plan = plan or self.plan
        rows = choose_rows(
            plan.recipe,
            [
                CandidateRow(query_id, [ids[0]], ids[1:], ["bm25"] * 2, [1.0, 1.0], [1, 2])
                for query_id, ids in zip(self.query_ids, (self.passage_ids[:3], self.passage_ids[3:]), strict=True)
            ],
        )
        scores = dict(zip(self.passage_ids, [5.0, 1.0, 2.0, 3.0, 6.0, 4.0], strict=True))
        return build_table(
            plan.recipe,
            rows,
            cache=plan.cache,
            fields=plan.table_fields,
            gold_sim=lambda _, __, ids: np.array([scores[each] for each in ids], dtype=np.float32),
        )


@pytest.fixture
def place(tmp_path: Path, sample_folder: Path) -> Place:
    return Place(tmp_path, sample_folder)


def facts_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "facts.json").read_text(encoding="utf-8")))


def test_the_page_is_made_from_the_bank_beside_the_table_and_then_found(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="sparsekd")
    table = place.table()
    before = table.artifact.manifest

    first = examined(place.plan, table, {"command": "x"})
    second = examined(place.plan, ScoreTable.open(table.artifact.folder), {"command": "y"})

    assert first is not None
    assert second is not None
    assert first.folder.parent == place.plan.cache / "doctor"
    assert second.manifest == first.manifest
    assert first.manifest["command"] == "x"
    assert facts_of(first.folder)["teachers"]["lexical"]["range"]["max"] == 6.0
    assert ScoreTable.open(table.artifact.folder).artifact.manifest == before
    assert caplog.text.count("teacher lexical (weight 1): 6 pairs; gold_sim 1..6, mean 3.5, std 1.71") == 2


def test_another_temperature_makes_another_page_of_the_same_table(place: Place) -> None:
    table, warmer = place.table(), place.plan_of(training={"temperature": 4.0})

    pages = [examined(plan, table, {}) for plan in (place.plan, warmer)]

    softmaxes = [facts_of(page.folder)["softmax"] for page in pages if page is not None]
    assert [softmax["temperature"] for softmax in softmaxes] == [2.0, 4.0]
    assert softmaxes[0]["entropy"] < softmaxes[1]["entropy"]


def test_a_measured_untrained_student_gives_the_scale(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"system": "student", "untrained": "u"}
    monkeypatch.setattr(Plan, "system_fields", lambda _: {"student:untrained": run})
    with publish(place.plan.folder("runs", run), kind="run", fields=run, extra={}) as temporary:
        (temporary / "run.trec").write_text("q0 Q0 x 1 14.0 s\nq0 Q0 y 2 10.0 s\n", encoding="utf-8")

    page = examined(place.plan, place.table(), {})

    assert page is not None
    assert facts_of(page.folder)["calibration"]["student_std"] == 2.0
    assert facts_of(page.folder)["calibration"]["set"] == '[labels.calibration] kind = "zscore", scale = 2 or above'


def test_a_student_that_is_not_here_yet_is_not_needed(place: Place) -> None:
    run = {"system": "student"}
    with publish(place.plan.folder("runs", run), kind="run", fields=run, extra={}) as temporary:
        (temporary / "run.trec").write_text("q0 Q0 x 1 14.0 s\n", encoding="utf-8")
    elsewhere = place.plan_of(student={"model": str(place.folder / "not" / "here")})

    page = examined(elsewhere, place.table(), {})

    assert page is not None
    assert facts_of(page.folder)["calibration"]["student_std"] is None


def test_a_table_that_no_score_labels_has_no_page(place: Place) -> None:
    plan = place.plan_of(labels={"kind": "none", "num_negatives": 2}, training={"loss": "SparseMultipleNegativesRankingLoss"})

    assert examined(plan, place.table(plan), {}) is None
    assert not (plan.cache / "doctor").exists()


def test_a_damaged_page_is_named(place: Place) -> None:
    table = place.table()
    page = examined(place.plan, table, {})
    assert page is not None
    text = (page.folder / "facts.json").read_text(encoding="utf-8")

    (page.folder / "facts.json").write_text(text.replace("lexical", "lexicon"), encoding="utf-8")

    with pytest.raises(IntegrityError, match=r"facts\.json: checksum"):
        examined(place.plan, table, {})


def test_the_doctor_imports_no_torch() -> None:
    program = "import sys, sparsekd.doctor; print('torch' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout == "False\n"
