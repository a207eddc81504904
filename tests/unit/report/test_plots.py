"""Drawings as part of a page: colours that follow it, ids of their own, labels that are text."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from sparsekd.report.plots import BASELINE, STUDENT, TEACHER, Line, Plots, Point, file_of, series
from sparsekd.report.teaching import histogram, waterfall

NAME = 'a$b_1$ <i>"x"</i> \u202e\u0007'


def all_drawings() -> list[str]:
    plots = Plots()
    points = histogram({"positives": np.array([0.0, 1, 2]), "negatives": np.array([-1.0, np.nan])})
    assert points is not None
    steps = waterfall({"proposed": 10, "dropped_filter": 3, "kept": 7}, {"candidates_dropped_filter": 2})
    drawings = [
        plots.lines(NAME, [Line(NAME, [1, 2], [3, 4], STUDENT)], x_label="step", levels={"budget": (3.5, TEACHER)}),
        plots.lines("log", [Line("_hidden", [1, 9], [9, 1], STUDENT), Line("b", [1, 9], [9, 1], BASELINE)], x_label="x", log=True),
        plots.histogram(NAME, points, x_label="gold_sim"),
        plots.bars(NAME, {NAME: 3, "other": 4}, x_label="n"),
        plots.waterfall("steps", steps, x_label="passages"),
        plots.trade_off(NAME, [Point(NAME, 1.0, 0.5)], x_label="FLOPS", y_label="nDCG@10", levels={NAME: (0.6, TEACHER)}),
    ]
    return [str(drawing.svg) for drawing in drawings]


def test_colours_are_the_pages_own() -> None:
    for svg in all_drawings():
        assert "var(--ink)" in svg
        assert re.findall(r"#0[0-9a-f]{5}\b", svg) == []
        assert re.findall(r"(?:fill|stroke): (?!none|var\()[^;\"]+", svg) == []


def test_a_file_of_a_drawing_is_svg_with_the_pages_colours_in_it() -> None:
    drawing = Plots().trade_off(NAME, [Point("1", 1.0, 0.5)], x_label="FLOPS", y_label="nDCG@10", levels={})

    root = ElementTree.fromstring(file_of(drawing, ":root{--paper:#fff;--ink:#1d2430}"))

    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.findtext("{http://www.w3.org/2000/svg}style") == ":root{--paper:#fff;--ink:#1d2430}"
    assert float(root.attrib["viewBox"].split()[2]) > 100


def test_no_two_drawings_share_an_id_and_every_reference_is_its_own() -> None:
    ids = [re.findall(r'\bid="([^"]+)"', svg) for svg in all_drawings()]

    assert len({each for part in ids for each in part}) == sum(map(len, ids))
    for svg, own in zip(all_drawings(), ids, strict=True):
        assert {a or b for a, b in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg)} <= set(own)


def test_labels_are_text_and_never_markup_or_formulas() -> None:
    for svg in all_drawings():
        assert "<i>" not in svg
        assert "\u202e" not in svg
        assert "\u0007" not in svg
        assert "mathdefault" not in svg
        assert "http" not in svg
    assert sum('a$b_1$ &lt;i&gt;"x"&lt;/i&gt;' in svg for svg in all_drawings()) >= 3


def test_a_label_with_an_underscore_is_in_the_legend() -> None:
    assert any("_hidden" in svg for svg in all_drawings()[1:2])


def test_the_text_alternative_says_the_values() -> None:
    plot = Plots().lines("loss", [Line("all", [1, 2], [3.25, 0.5], STUDENT)], x_label="step")

    assert ">step from left to right. all from 3.25 to 0.5.</desc>" in plot.svg


def test_a_drawing_does_not_change_the_style_of_other_plots() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    all_drawings()

    assert dict(matplotlib.rcParams) == before


def test_a_waterfall_ends_with_what_is_left() -> None:
    steps = waterfall({"proposed": 10, "dropped_a": 1, "dropped_b": 2, "dropped_c": 0, "kept": 7}, {"candidates_dropped_filter": 3})

    assert [(step.name, step.count, step.is_dropped) for step in steps] == [
        ("proposed", 10, False),
        ("b", 2, True),
        ("a", 1, True),
        ("candidates kept", 7, False),
        ("filter by a teacher", 3, True),
        ("candidates left", 4, False),
    ]


def test_a_histogram_of_nothing_is_none() -> None:
    assert histogram({"a": np.array([np.nan]), "b": np.array([])}) is None


def test_a_series_has_the_entries_with_its_key() -> None:
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "dev": 1.0}, {"step": 3, "loss": 1.0}]

    assert series(log, "loss") == ([1, 3], [2.0, 1.0])


@pytest.mark.parametrize("values", [[5.0, 5.0], [1e9, 1e9 + 1]])
def test_a_flat_series_can_be_drawn(values: list[float]) -> None:
    assert Plots().lines("flat", [Line("a", [1, 2], values, STUDENT)], x_label="step").svg.startswith("<svg")
