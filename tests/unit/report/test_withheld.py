"""Pages of a collection whose texts may not be published: what is left out, what stays, and that no key knows of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sparsekd.artifact import key_of
from sparsekd.collection.beir import read_texts
from sparsekd.experiment import Experiment
from sparsekd.plan import Plan
from sparsekd.report.experiment import ExperimentFacts, read_experiment
from sparsekd.report.page import render_experiment
from sparsekd.report.study import write_study
from sparsekd.study import member_plans


class Withheld(NamedTuple):
    """The finished experiment again, its texts not to be published."""

    plan: Plan
    facts: ExperimentFacts
    page: str


@pytest.fixture(scope="module")
def withheld(finished: Any) -> Withheld:
    plan = finished.experiment.plan
    collection = plan.recipe.collection.model_copy(update={"publish_texts": False})
    plan = replace(plan, recipe=plan.recipe.model_copy(update={"collection": collection}))
    facts = read_experiment(Experiment(plan))
    return Withheld(plan, facts, render_experiment(facts))


def test_no_key_knows_whether_texts_are_published(withheld: Withheld, finished: Any) -> None:
    kinds = ["candidates", "tables", "students", "evaluations"]

    keys = [
        [*((kind, key_of(fields)) for kind, fields in plan.artifacts(kinds)), *map(key_of, plan.system_fields().values())]
        for plan in (withheld.plan, finished.experiment.plan)
    ]

    assert keys[0] == keys[1]


def test_no_text_of_the_collection_is_on_the_page(
    withheld: Withheld, finished: Any, sample_folder: Path, elements_of: Any
) -> None:
    queries, passages = read_texts(sample_folder)
    sentences = {part for text in (*queries.values(), *passages.values()) for part in re.split(r"(?<=[.?!]) ", text) if " " in part}
    shown, page = (elements_of(page).text for page in (finished.page, withheld.page))

    assert len([sentence for sentence in sentences if sentence in shown]) > 10
    assert [sentence for sentence in sentences if sentence in page] == []
    assert "alert(1)" not in page


def test_terms_that_a_text_holds_are_left_out_and_counted(withheld: Withheld, finished: Any) -> None:
    collection = finished.experiment.collection

    for example, whole in zip(withheld.facts.examples, finished.facts.examples, strict=True):
        words = {"query_terms": collection.queries[example.query_id]}
        if "passage_id" in whole.terms:
            words["passage_terms"] = collection.passages[whole.terms["passage_id"]]
        for side, text in words.items():
            own = [term for term, _, is_own in whole.terms[side] if is_own]
            assert example.terms[f"{side}_withheld"] == len(own)
            left = {term for term, _, _ in example.terms[side]}
            assert left.isdisjoint(own)
            assert left.isdisjoint(re.findall(r"\w+", text.lower()))
        held = set(re.findall(r"\w+", " ".join(words.values()).lower()))
        assert held.isdisjoint(term for term, *_ in example.terms.get("matches", []))
    assert withheld.page.count('class="term own"') == 1  # the legend's


def test_what_is_left_of_a_score_and_what_was_left_out_add_up_to_it(withheld: Withheld) -> None:
    checked = 0
    for example in withheld.facts.examples:
        if "matches" in example.terms:
            left = sum(product for *_, product in example.terms["matches"])
            assert left + example.terms["score_withheld"] == pytest.approx(example.hits["student"][0].score, rel=1e-4)
            checked += 1
    assert checked > 0


def test_ids_judgements_and_scores_stay(withheld: Withheld, finished: Any, elements_of: Any) -> None:
    text = elements_of(withheld.page).text

    for example, whole in zip(withheld.facts.examples, finished.facts.examples, strict=True):
        assert replace(example, query=whole.query, hits={}, terms={}) == replace(whole, hits={}, terms={})
        for system, hits in example.hits.items():
            assert [replace(hit, text="") for hit in hits] == [replace(hit, text="") for hit in whole.hits[system]]
            assert all(hit.text is None and hit.passage_id in text for hit in hits)
        assert example.query_id in text


def test_the_page_says_what_is_left_out_and_why(withheld: Withheld, finished: Any, elements_of: Any) -> None:
    elements = elements_of(withheld.page)

    assert "withheld" in elements.values_of("id")
    assert "this collection's texts are not to be published ([collection] publish_texts = false)" in elements.text
    assert "of the text's own left out" in elements.text
    assert "withheld" not in elements_of(finished.page).values_of("id")


@pytest.mark.parametrize("publish", [True, False])
def test_the_page_of_a_study_says_so_too_and_its_members_have_it_from_the_study(
    publish: bool, make_plan: Callable[..., Plan], tmp_path: Path, elements_of: Any
) -> None:
    study = {"members": [["labels.num_negatives=1"], ["labels.num_negatives=2"]]}
    plan = make_plan(tmp_path / "cache", study=study)
    collection = {"path": str(plan.collection_folder), "publish_texts": publish}
    plan = make_plan(tmp_path / "cache", study=study, collection=collection)
    members = member_plans(plan)

    page = write_study(plan, members).read_text(encoding="utf-8")

    assert [each.recipe.collection.publish_texts for _, each in members] == [publish, publish]
    assert ("withheld" in elements_of(page).values_of("id")) is not publish
    assert ("the members' pages leave out those of queries and passages" in elements_of(page).text) is not publish
