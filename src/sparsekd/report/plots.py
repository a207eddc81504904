"""Facts drawn as inline SVG: matplotlib's output with ids of its own and colours as CSS variables, so that a page is light or dark.

Each drawing has a title and a description that say what it shows to who does not see it. Text stays text.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from sparsekd.report.teaching import Histogram, Step
from sparsekd.report.text import visible

# Drawn in these, shown in the page's: every value here is used for nothing else.
INK, GRID = "#010101", "#020202"
STUDENT, TEACHER, BASELINE, UNTRAINED = "#030301", "#030302", "#030303", "#030304"
SERIES = (STUDENT, TEACHER, BASELINE, UNTRAINED, "#030305", "#030306")
_VARIABLES = {INK: "--ink", GRID: "--grid", **{colour: f"--series-{number}" for number, colour in enumerate(SERIES, start=1)}}

_WIDTH, _HEIGHT = 4.6, 2.9  # inches at 72 points: one point is about one pixel at 390 px
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same widths everywhere
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.6,
    **{name: INK for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")},
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "sparsekd",  # the same drawing has the same ids
}
_WHOLE = FuncFormatter(lambda value, _: f"{value:,.0f}")
_styled = matplotlib.rc_context(_STYLE)  # type: ignore[arg-type]  # as a decorator: entered anew for each call


class Drawing(NamedTuple):
    """A plot and what it is called."""

    title: str
    svg: Markup


def file_of(drawing: Drawing, colours: str) -> bytes:
    """Return a drawing as an SVG file, light or dark as whoever shows it; ``colours`` is CSS with the variables of the pages."""
    head, _, rest = str(drawing.svg).partition(">")
    style = f'<style>{colours}</style><rect width="100%" height="100%" style="fill:var(--paper)"/>'
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{rest}\n'.encode()


@dataclass(frozen=True)
class Line:
    """A series over steps or ranks."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    dashed: bool = False
    markers: bool = False


@dataclass(frozen=True)
class Point:
    """A system or a member of a study: what it costs and what it reaches."""

    label: str
    cost: float
    quality: float
    colour: str = STUDENT
    is_marked: bool = True
    """Whether its label is written beside it."""


@dataclass
class Plots:
    """Draws the plots of one page; ids are numbered so that no two drawings of it share one."""

    _count: int = field(default=0)

    @_styled
    def lines(
        self,
        title: str,
        lines: Sequence[Line],
        *,
        x_label: str,
        y_label: str = "",
        levels: Mapping[str, tuple[float, str]] | None = None,
        log: bool = False,
    ) -> Drawing:
        """Draw series; ``levels``: label -> (height, colour) of dashed lines across; ``log`` scales both axes."""
        figure, axes = self._figure(title, x_label, y_label)
        for line in lines:
            style = "--" if line.dashed else "-"
            axes.plot(
                line.x,
                line.y,
                style,
                color=line.colour,
                label=_name(line.label),
                marker="o" if line.markers else None,
                markersize=3.5,
            )
        _levels(axes, levels or {})
        if log:
            axes.set_xscale("log")
            axes.set_yscale("log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(_WHOLE)  # its own are formulas
                axis.set_minor_formatter(NullFormatter())
        if len(lines) + len(levels or {}) > 1:
            _legend(axes)
        told = "; ".join(f"{line.label} from {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in lines if len(line.y))
        told += "".join(f"; {label} at {height:.4g}" for label, (height, _) in (levels or {}).items())
        return self._svg(figure, title, f"{x_label} from left to right. {told}.")

    @_styled
    def histogram(self, title: str, histogram: Histogram, *, x_label: str) -> Drawing:
        """Draw shares of groups over the same bins, as filled steps one before the other."""
        figure, axes = self._figure(title, x_label, "share of values")
        for (name, shares), colour in zip(histogram.groups.items(), SERIES, strict=False):
            axes.stairs(shares, histogram.edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(shares, histogram.edges, color=colour, label=name, linewidth=1.4)
        if len(histogram.groups) > 1:
            _legend(axes)
        modes = {name: _mode(shares, histogram.edges) for name, shares in histogram.groups.items()}
        told = "; ".join(f"{name} most often near {mode:.3g}" for name, mode in modes.items())
        return self._svg(figure, title, f"Histogram from {histogram.edges[0]:.3g} to {histogram.edges[-1]:.3g}: {told}.")

    @_styled
    def bars(self, title: str, counts: Mapping[str, float], *, x_label: str) -> Drawing:
        """Draw one horizontal bar per name."""
        figure, axes = self._figure(title, x_label, "", height=0.8 + 0.3 * len(counts))
        names = [_name(name) for name in counts]
        drawn = axes.barh(range(len(counts)), list(counts.values()), color=STUDENT, height=0.6)
        axes.bar_label(drawn, [f"{value:,.0f}" for value in counts.values()], padding=3, fontsize=8)
        _rows(axes, names)
        return self._svg(figure, title, "; ".join(f"{name} {value:,.0f}" for name, value in counts.items()) + ".")

    @_styled
    def waterfall(self, title: str, steps: Sequence[Step], *, x_label: str) -> Drawing:
        """Draw what is left as full bars and what was dropped as the piece that it took away."""
        figure, axes = self._figure(title, x_label, "", height=0.8 + 0.3 * len(steps))
        left = 0
        for row, step in enumerate(steps):
            start = left - step.count if step.is_dropped else 0
            left = start if step.is_dropped else step.count
            axes.barh(row, step.count, left=start, color=TEACHER if step.is_dropped else STUDENT, height=0.6)
            sign = "−" if step.is_dropped else ""
            axes.annotate(
                f"{sign}{step.count:,}", (start + step.count, row), (3, 0), textcoords="offset points", va="center", fontsize=8
            )
        _rows(axes, [_name(step.name) for step in steps])
        told = "; ".join(f"{step.name} {'takes' if step.is_dropped else 'are'} {step.count:,}" for step in steps)
        return self._svg(figure, title, f"{told}.")

    @_styled
    def trade_off(
        self,
        title: str,
        points: Sequence[Point],
        *,
        x_label: str,
        y_label: str,
        levels: Mapping[str, tuple[float, str]],
        front: Sequence[tuple[float, float]] = (),
    ) -> Drawing:
        """Draw quality over cost, what is measured without a cost as dashed lines, and the front that nothing else beats."""
        figure, axes = self._figure(title, x_label, y_label, height=3.4)
        if len(front) > 1:
            axes.plot(*zip(*front, strict=True), drawstyle="steps-post", color=STUDENT, linewidth=1.2, label="Pareto front")
        middle = (min(costs) + max(costs)) / 2 if (costs := [point.cost for point in points]) else 0.0
        for point in points:
            axes.plot([point.cost], [point.quality], "o", color=point.colour, markersize=5.5)
            if point.is_marked:
                side: Any = ("right", (-5, 5)) if point.cost > middle else ("left", (5, 5))
                place = (point.cost, point.quality)
                axes.annotate(_name(point.label), place, side[1], ha=side[0], textcoords="offset points", fontsize=8)
        _levels(axes, levels)
        axes.margins(x=0.18, y=0.12)
        if len(front) > 1 or levels:
            _legend(axes)
        told = "; ".join(f"{point.label}: {y_label} {point.quality:.4f} at {point.cost:.4g}" for point in points)
        told += "".join(f"; {label}: {height:.4f}" for label, (height, _) in levels.items())
        return self._svg(figure, title, f"{x_label} from left to right. {told}.")

    def _figure(self, title: str, x_label: str, y_label: str, height: float = _HEIGHT) -> tuple[Figure, Axes]:
        figure = Figure(figsize=(_WIDTH, height))
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        return figure, axes

    def _svg(self, figure: Figure, title: str, description: str) -> Drawing:
        """Return the figure as an element of an HTML page."""
        self._count += 1
        stream = io.StringIO()
        with warnings.catch_warnings():
            # Letters that the font lacks are measured as boxes; the page's reader draws them in a font that has them.
            warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
            figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        svg = stream.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
        for colour, variable in _VARIABLES.items():
            svg = svg.replace(colour, f"var({variable})")
        prefix = f"plot{self._count}-"
        svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
        svg = re.sub(
            r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-labelledby="{prefix}t {prefix}d">', svg
        )
        svg = svg.replace("xlink:href", "href")  # HTML knows no namespaces, and SVG 2 needs none
        told = f'<title id="{prefix}t">{escape(visible(title))}</title><desc id="{prefix}d">{escape(visible(description))}</desc>'
        return Drawing(title, Markup(svg.replace(">", f">{told}", 1)))  # matplotlib's, which escapes text


def _legend(axes: Axes) -> None:
    """Put the legend above the drawing, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0.2, columnspacing=1.2)


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.18)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(_WHOLE)


def _levels(axes: Axes, levels: Mapping[str, tuple[float, str]]) -> None:
    for label, (height, colour) in levels.items():
        axes.axhline(height, color=colour, linestyle="--", linewidth=1.2, label=_name(label))


def _name(label: str) -> str:
    """A label in a drawing: visible, short, and shown in a legend whatever it starts with."""
    shown = visible(label, 48)
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib leaves labels with an underscore out of legends


def _mode(shares: Sequence[float], edges: Sequence[float]) -> float:
    best = max(range(len(shares)), key=shares.__getitem__)
    return (edges[best] + edges[best + 1]) / 2


def series(log: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Return steps and values of the entries of a log that have ``key``."""
    entries = [entry for entry in log if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]
