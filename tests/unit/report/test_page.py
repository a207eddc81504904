"""The page of an experiment: every element is there, everything is escaped, nothing acts and nothing leaks."""

from __future__ import annotations

import getpass
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsekd.evaluation.measures import MEASURES
from sparsekd.experiment import Experiment, candidates, score_table, student
from sparsekd.plan import Plan
from sparsekd.report.page import write_report

SECTIONS = ["result", "training", "teachers", "queries", "vocabulary", "provenance"]


def drawings_of(page: str) -> list[str]:
    """Titles of the plots, in order."""
    return re.findall(r"<svg [^>]*><title [^>]*>([^<]*)</title><desc [^>]*>[^<]+</desc>", page)


def test_every_section_is_there(finished: Any, elements_of: Any) -> None:
    elements = elements_of(finished.page)

    ids = elements.values_of("id")
    assert [name for name in ids if name in SECTIONS] == SECTIONS
    assert "missing" not in ids
    assert {"systems", "comparisons", "reuse", "agreement", "most-active", "stages", "recipe", "counts", "warnings"} <= set(ids)
    assert [href for href in elements.values_of("href") if href.startswith("#") and href[1:] not in ids] == []


def test_every_plot_is_there_with_a_text_alternative(finished: Any) -> None:
    titles = drawings_of(finished.page)

    assert titles == [
        "Quality against cost",
        "Loss and its components",
        "Weight of the regularizers",
        "Active dims of the batch",
        "nDCG@10 on dev queries",
        "Candidates by miner",
        "From proposals to candidates",
        "tiny: gold_sim of positives and negatives",
        "tiny: margins",
        "lexical: gold_sim of positives and negatives",
        "lexical: margins",
        "Document frequency of terms",
    ]
    assert finished.page.count("<svg ") == len(titles)


def test_the_figures_are_those_of_the_evaluation(finished: Any, elements_of: Any) -> None:
    text = elements_of(finished.page).text

    for system in finished.facts.results.systems.values():
        for measure in MEASURES:
            assert system.estimates[measure].mean == pytest.approx(system.figures[measure], abs=1e-12)
            assert f"{system.figures[measure]:.4f}" in text
    sparse = finished.facts.results.systems["student"]
    assert sparse.index_bytes == round(sparse.figures["passage_active_dims"] * 28) * 8
    assert set(sparse.rates) == {"queries_per_second", "passages_per_second", "search_ms"}


def test_the_terms_that_made_a_score_add_up_to_it(finished: Any) -> None:
    for example in finished.facts.examples:
        if "matches" in example.terms:
            [best, *_] = example.hits["student"]
            assert example.terms["passage_id"] == best.passage_id
            assert sum(product for *_, product in example.terms["matches"]) == pytest.approx(best.score, rel=1e-4)


def test_own_terms_are_told_from_expansions(finished: Any) -> None:
    terms = {
        (example.query_id, term): is_own for example in finished.facts.examples for term, _, is_own in example.terms["query_terms"]
    }

    assert set(terms.values()) == {True, False}
    for (query_id, term), is_own in terms.items():
        words = re.findall(r"[a-z]+", finished.experiment.collection.queries[query_id].lower())
        if len(term) > 1 and not term.startswith(("##", "[")):
            assert is_own == (term in words)


def test_all_test_queries_of_so_small_a_collection_are_examples(finished: Any) -> None:
    assert {example.query_id for example in finished.facts.examples} == set(finished.experiment.collection.qrels["test"])
    assert all(list(example.hits) == ["bm25", "teacher:tiny", "student"] for example in finished.facts.examples)


def test_nothing_on_the_page_acts(finished: Any, elements_of: Any) -> None:
    elements = elements_of(finished.page)

    assert elements.tags() & {"script", "iframe", "object", "embed", "form", "base", "img", "video", "audio"} == set()
    attributes = {name for _, found in elements.found for name in found}
    assert [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action", "ping")] == []
    assert {href for href in elements.values_of("href") if not href.startswith("#")} == {"data:,"}
    assert "url(" not in re.sub(r"url\(#[^)]*\)", "", finished.page)
    policy = next(found["content"] for tag, found in elements.found if found.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert "script-src" not in policy


def test_hostile_texts_are_shown_as_they_are(finished: Any, elements_of: Any) -> None:
    text = elements_of(finished.page).text

    assert '<script>alert(1)</script><img src=x onerror="alert(2)"> {{ 7 * 7 }} & &amp; שלום $x_1$ ⟨U+202E⟩gnp.exe␀␇' in text
    assert "<b>bold</b> " in text
    assert "\u202e" not in finished.page
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f]", finished.page) is None


def test_hostile_ids_reach_the_run_and_the_page_as_they_were_written(finished: Any, elements_of: Any) -> None:
    cache, text = finished.experiment.plan.cache, elements_of(finished.page).text
    runs = [path.read_text(encoding="utf-8").splitlines() for path in cache.rglob("*.trec")]

    assert runs
    for identity in ("-rf<b>", "../../<i>x</i>", "007"):
        assert any(identity in line.split() for lines in runs for line in lines)
        assert identity in text
    assert not any(word in path.as_posix() for path in cache.rglob("*") for word in ("-rf<b>", "<i>", "007.", "/007"))


def test_a_passage_of_a_megabyte_is_cut_and_says_so(finished: Any, elements_of: Any) -> None:
    assert len(finished.page.encode("utf-8")) < 3_000_000
    assert "x" * 1000 not in finished.page


def test_ids_are_unique(finished: Any, elements_of: Any) -> None:
    ids = elements_of(finished.page).values_of("id")

    assert sorted({each for each in ids if ids.count(each) > 1}) == []
    referred = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', finished.page)
    assert {a or b for a, b in referred} <= set(ids)


def test_no_path_and_no_name_of_the_machine_leaks(finished: Any) -> None:
    plan = finished.experiment.plan
    cleaned = finished.page.replace(plan.collection_folder.name, "")

    for leak in (str(plan.cache.parent.parent), str(Path.home()) + "/", "/tmp/", str(plan.collection_folder)):
        assert leak not in cleaned
    assert re.search(rf"\b{re.escape(socket.gethostname())}\b", cleaned) is None
    assert f"/{getpass.getuser()}/" not in cleaned
    assert "…/hostile" in finished.page  # the collection's path, cut


def test_provenance_names_every_key_and_the_overrides(finished: Any, elements_of: Any) -> None:
    plan, text = finished.experiment.plan, elements_of(finished.page).text

    for kind, fields in plan.artifacts(["candidates", "tables", "students", "evaluations"]):
        assert plan.folder(kind, fields).name in text
    for fields in plan.system_fields().values():
        assert plan.folder("runs", fields).name in text
    assert "--set training.max_steps=6" in text
    assert "training.dev_steps" in text
    manifest = json.loads((plan.folder("students", plan.student_fields) / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["wall_seconds"] > 0
    assert all(version in text for version in manifest["versions"].values())


def test_the_same_experiment_has_the_same_page(finished: Any) -> None:
    before = finished.page

    assert write_report(Experiment(Plan(finished.experiment.recipe, finished.experiment.plan.overrides))) == finished.path
    assert finished.path.read_text(encoding="utf-8") == before


@pytest.fixture
def half(make_plan: Callable[..., Plan], tmp_path: Path) -> Experiment:
    return Experiment(make_plan(tmp_path / "cache"))


def missing_of(path: Path, elements_of: Any) -> str:
    page = path.read_text(encoding="utf-8")
    elements_of(page)
    found = re.search(r'<div class="missing".*?</div>', page, re.DOTALL)
    assert found is not None
    return found[0]


def test_before_anything_is_made_the_page_says_so(half: Experiment, elements_of: Any) -> None:
    missing = missing_of(write_report(half), elements_of)

    for what in ("candidates and teacher scores", "the trained student", "the ranking of bm25", "the ranking of student"):
        assert what in missing
    assert not (half.plan.cache / "runs").exists()


def test_a_page_of_stage_1_shows_teachers_and_what_is_missing(half: Experiment, elements_of: Any) -> None:
    candidates(half)
    first = missing_of(write_report(half), elements_of)
    score_table(half)

    path = write_report(half)

    assert "candidates are mined, but not scored yet" in first
    assert "candidates" not in missing_of(path, elements_of)
    assert drawings_of(path.read_text(encoding="utf-8"))[:2] == ["Candidates by miner", "From proposals to candidates"]


@pytest.mark.slow
def test_a_student_without_an_evaluation_shows_its_training(half: Experiment, elements_of: Any) -> None:
    student(half)

    path = write_report(half)

    assert "Loss and its components" in drawings_of(path.read_text(encoding="utf-8"))
    assert "the ranking of student: not measured yet" in missing_of(path, elements_of)
