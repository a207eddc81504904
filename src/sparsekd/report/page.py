"""Facts into one HTML file: plots, templates, escaping.

Every value that a template prints is escaped by jinja2 and made visible by ``text``; only drawings of ``plots`` pass as markup.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sparsekd.artifact import key_of, write_file_atomically
from sparsekd.evaluation.measures import MEASURES
from sparsekd.evaluation.vocabulary import STOP_WORDS
from sparsekd.experiment import Experiment
from sparsekd.plan import Plan
from sparsekd.report.experiment import ExperimentFacts, read_experiment
from sparsekd.report.plots import BASELINE, SERIES, STUDENT, TEACHER, UNTRAINED, Drawing, Line, Plots, Point, series
from sparsekd.report.results import BM25, BYTES_PER_POSTING, Results
from sparsekd.report.results import STUDENT as STUDENT_NAME
from sparsekd.report.results import UNTRAINED as UNTRAINED_NAME
from sparsekd.report.text import visible, without_paths

_TEMPLATES = Path(__file__).parent / "templates"
COLOURS = _TEMPLATES / "colours.css"
SYSTEM_COLOURS = {STUDENT_NAME: STUDENT, UNTRAINED_NAME: UNTRAINED, BM25: BASELINE}
_PASSAGE_CHARACTERS = 320


def write_report(experiment: Experiment) -> Path:
    """Write the page of an experiment as far as it has come; return its path, which is the same for the same experiment."""
    page = render_experiment(read_experiment(experiment))
    path = experiment_path(experiment.plan)
    write_file_atomically(path, page.encode("utf-8"))
    return path


def experiment_path(plan: Plan) -> Path:
    """Return where the page of an experiment is, or will be: named by the key of its evaluation, finished or not."""
    return plan.cache / "reports" / f"{key_of(plan.evaluation_fields())}.html"


def render_experiment(facts: ExperimentFacts) -> str:
    """Return the whole page."""
    return environment().get_template("experiment.html").render(facts=facts, plots=experiment_plots(facts), **NAMES)


def experiment_plots(facts: ExperimentFacts) -> dict[str, Any]:
    """Draw what there are facts for, by the place on the page."""
    plots = Plots()
    drawn: dict[str, Any] = {"cost": None, "miners": None, "waterfall": None, "teachers": {}, "frequency": None}
    costs = _cost_points(facts.results)
    if costs:
        levels = quality_levels(facts.results)
        drawn["cost"] = plots.trade_off(
            "Quality against cost", costs, x_label="FLOPS (expected multiplications)", y_label=MEASURES[0], levels=levels
        )
    drawn["training"] = _training_plots(plots, facts)
    if facts.teaching is not None:
        if facts.teaching.kept_by_miner:
            drawn["miners"] = plots.bars("Candidates by miner", facts.teaching.kept_by_miner, x_label="candidates kept")
        if facts.teaching.waterfall:
            drawn["waterfall"] = plots.waterfall("From proposals to candidates", facts.teaching.waterfall, x_label="passages")
        drawn["teachers"] = {
            teacher.name: [
                plots.histogram(f"{teacher.name}: {what}", histogram, x_label=label)
                for what, histogram, label in (
                    ("gold_sim of positives and negatives", teacher.gold_sim, "raw gold_sim"),
                    ("margins", teacher.margins, "gold_sim(positive) − gold_sim(negative)"),
                )
                if histogram is not None
            ]
            for teacher in facts.teaching.teachers
        }
    curves = [
        Line(bare(name), [rank for rank, _ in points], [count for _, count in points], SYSTEM_COLOURS.get(name, TEACHER))
        for name, system in facts.results.systems.items()
        if system.vocabulary and (points := system.vocabulary["curve"]) and name in SYSTEM_COLOURS
    ]
    if curves:
        drawn["frequency"] = plots.lines(
            "Document frequency of terms", curves, x_label="rank of the term", y_label="passages with the term", log=True
        )
    return drawn


def quality_levels(results: Results) -> dict[str, tuple[float, str]]:
    """Return the measured systems that have no sparse cost as levels of nDCG@10."""
    levels = {bare(BM25): (results.systems[BM25].figures[MEASURES[0]], BASELINE)} if BM25 in results.systems else {}
    others = [
        teacher for teacher in results.teachers if BM25 not in results.systems or teacher.run.key != results.systems[BM25].run.key
    ]
    colours = itertools.cycle((TEACHER, *SERIES[4:]))  # those that no other system has
    return levels | {bare(teacher.name): (teacher.figures[MEASURES[0]], next(colours)) for teacher in others}


def _cost_points(results: Results) -> list[Point]:
    return [
        Point(bare(name), system.figures["FLOPS"], system.figures[MEASURES[0]], SYSTEM_COLOURS[name])
        for name, system in results.systems.items()
        if "FLOPS" in system.figures and name in SYSTEM_COLOURS
    ]


def _training_plots(plots: Plots, facts: ExperimentFacts) -> list[Drawing]:
    if facts.training is None or not facts.training.steps:
        return []
    log = facts.training.steps
    losses = [key for key in log[-1] if key == "loss" or key.endswith("_loss") or key.startswith("Sparse")]
    names = {"loss": "all, weighted", "base_loss": "distillation", "query_regularizer_loss": "regularizer, queries"}
    names["document_regularizer_loss"] = "regularizer, passages"
    drawn = [
        plots.lines(
            "Loss and its components",
            [Line(names.get(key, key), *series(log, key), colour) for key, colour in zip(losses, SERIES, strict=False)],
            x_label="step",
        ),
        plots.lines(
            "Weight of the regularizers",
            [
                Line("lambda_query", *series(log, "lambda_query"), SERIES[0]),
                Line("lambda_passage", *series(log, "lambda_passage"), SERIES[1]),
            ],
            x_label="step",
        ),
        plots.lines(
            "Active dims of the batch",
            [
                Line("queries", *series(log, "query_active_dims"), SERIES[0]),
                Line("passages", *series(log, "passage_active_dims"), SERIES[1]),
            ],
            x_label="step",
            levels=_budget(facts),
        ),
    ]
    if facts.training.dev:
        dev = Line("dev nDCG@10", *series(facts.training.dev, "dev_nDCG@10"), SERIES[0], markers=True)
        drawn.append(plots.lines("nDCG@10 on dev queries", [dev], x_label="step"))
    return drawn


def _budget(facts: ExperimentFacts) -> dict[str, tuple[float, str]]:
    asked = {key.rpartition(".")[2].removesuffix("_active_dims"): value for key, value in facts.recipe if "student.budget." in key}
    return {
        f"budget, {side}": (float(asked[side]), colour)
        for side, colour in (("query", SERIES[0]), ("passage", SERIES[1]))
        if asked.get(side)
    }


@functools.cache
def environment() -> jinja2.Environment:
    """Return the templates' environment: everything escaped, everything made visible, an unknown name an error."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalized,
        trim_blocks=True,
        lstrip_blocks=False,
    )
    made.filters |= {
        "figure": _figure,
        "signed": _signed,
        "count": lambda value: f"{value:,}",
        "megabytes": _megabytes,
        "p_value": _p_value,
        "passage": lambda text: visible(text, _PASSAGE_CHARACTERS),
        "without_paths": _without_paths,
    }
    return made


def _finalized(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else visible(value)


def _without_paths(value: Any) -> str:
    return without_paths(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _figure(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−")


def _signed(value: float, digits: int = 4) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _megabytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e6:,.2f} MB"


def _p_value(value: float) -> str:
    return "p < .001" if value < 0.001 else f"p = {value:.3f}".replace("0.", ".")


def bare(name: str) -> str:
    """Return what a page calls a system."""
    return {STUDENT_NAME: "student", UNTRAINED_NAME: "untrained student", BM25: "BM25"}.get(
        name, name.replace("teacher:", "teacher ")
    )


NAMES: Mapping[str, Any] = {"MEASURES": MEASURES, "STOP_WORDS": STOP_WORDS, "BYTES_PER_POSTING": BYTES_PER_POSTING, "bare": bare}
