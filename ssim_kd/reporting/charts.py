"""Charts of the page: SVG by matplotlib, whose colours are variables of the page's style sheet.

A chart is then as readable in dark as in light, and its text has the page's font.
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from ..metrics_file import Series

#: Most points of the only curve of a chart; more are thinned.
MOST_POINTS = 300
#: Colours of runs in the style sheet, --run-0 and so on.
NUM_COLOURS = 8
# Stand-ins for variables of the style sheet, which matplotlib takes for colours.
_INK, _MUTED, _GRID, _SURFACE, _BAD = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "grid", _SURFACE: "surface", _BAD: "bad"}
_RUNS = {f"#{0xA0 + i:02x}0a0b": f"run-{i}" for i in range(NUM_COLOURS)}
_WIDTH, _HEIGHT = 5.0, 2.9  # inches of 72 units; a column of the page is about as many pixels
_STEPS = [1, 2, 2.5, 5, 10]
# Least range of AP on an axis: what differs by less is as good as equal.
_LEAST_RANGE = 8.0
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 11,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.axisbelow": True,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "text.color": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "path.simplify_threshold": 0.2,
}


@dataclass(frozen=True)
class Line:
    """A curve, or one row of bars or dots.

    Attributes:
        label: for those who do not see it.
        number: of the run, which gives the colour.
        series: of a curve.
        values: of bars and dots, by the name of the row.
        level: a value that holds for the whole chart, in the place of a curve.
        reference: whether it is compared with: dashed, or hollow.
    """

    label: str
    number: int
    series: Series | None = None
    level: float | None = None
    values: Mapping[str, float] | None = None
    reference: bool = False

    @property
    def colour(self) -> str:
        """The stand-in of its colour."""
        return list(_RUNS)[self.number % NUM_COLOURS]


def thin(series: Series, most: int = MOST_POINTS) -> Series:
    """At most so many points: the median of each of as many parts; NaN if a part has none."""
    if len(series.iterations) <= most:
        return series
    thinned = Series()
    parts = np.array_split(np.arange(len(series.iterations)), most)
    for part in parts:
        values = np.array([series.values[i] for i in part])
        known = values[np.isfinite(values)]
        thinned.iterations.append(series.iterations[part[len(part) // 2]])
        thinned.values.append(float(np.median(known)) if known.size else float("nan"))
    return thinned


def curves(name: str, title: str, lines: Sequence[Line], *, evaluations: bool = False) -> str:
    """Curves over iterations. A value that is not finite is a gap, and a cross at the top.

    Args:
        name: of the chart, unique on the page.
        title: of the chart, for those who do not see it.
        lines: at least one, with a series or a level. A series of one value is a dot.
        evaluations: whether the values are evaluations: each is marked, and the scale is linear.
            That of a loss may be logarithmic.
    """
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _figure(_HEIGHT, layout=None)
        # Axes of the same place and size in every chart; there is room for six digits.
        figure.subplots_adjust(left=0.135, right=0.985, bottom=0.12, top=0.96)
        finite: list[float] = []
        for line in lines:
            if line.level is not None:
                finite.append(line.level)
                axes.axhline(line.level, color=line.colour, linestyle="--")
            if line.series is None:
                continue
            # Noisy curves over one another are readable only if they are smooth.
            series = thin(line.series, max(MOST_POINTS // len(lines), MOST_POINTS // 5))
            values = np.array([v if np.isfinite(v) else np.nan for v in series.values])
            finite += values[np.isfinite(values)].tolist()
            marked = evaluations or len(values) == 1
            axes.plot(
                series.iterations,
                values,
                color=line.colour,
                linestyle="--" if line.reference else "-",
                marker="o" if marked else "",
                markersize=4.5,
            )
            _mark_lost(axes, line)
        if not evaluations and finite and max(finite) > 30 * min(finite) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=_STEPS, min_n_ticks=4))
            axes.margins(y=0.08)
            if evaluations:
                axes.set_ylim(_range_of_ap(*axes.get_ylim()))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
        axes.grid(axis="y")
        return _svg(figure, name, f"{title}: {', '.join(line.label for line in lines)}")


def _mark_lost(axes: Axes, line: Line) -> None:
    assert line.series is not None
    pairs = zip(line.series.iterations, line.series.values, strict=True)
    lost = [i for i, value in pairs if not np.isfinite(value)]
    # Some suffice to show where.
    lost = lost[:: max(1, len(lost) // 20)]
    heights = np.full(len(lost), 0.97)
    transform = axes.get_xaxis_transform()
    axes.plot(lost, heights, "x", color=_BAD, markersize=6, transform=transform, clip_on=False)


def bars(name: str, title: str, rows: Sequence[str], lines: Sequence[Line]) -> str:
    """Horizontal bars with their values, in groups; arguments as in :func:`curves`."""
    with matplotlib.rc_context(_SETTINGS):
        thick = 0.8 / max(len(lines), 1)
        figure, axes = _figure(0.5 + len(rows) * max(0.36, 0.19 * len(lines)))
        for place, line in enumerate(lines):
            values = [(line.values or {}).get(row, float("nan")) for row in rows]
            heights = np.arange(len(rows)) + (place - (len(lines) - 1) / 2) * thick
            drawn = axes.barh(heights, np.nan_to_num(values), thick * 0.86, color=line.colour)
            texts = [f"{v:.1f}" if np.isfinite(v) else "–" for v in values]
            axes.bar_label(drawn, texts, padding=4, fontsize=9.5, color=_MUTED)
        _rows(axes, rows)
        axes.axvline(0, color=_MUTED, linewidth=0.8)
        axes.margins(x=0.14)
        low, high = axes.get_xlim()
        axes.set_xlim(low if low < -0.5 else 0, max(high, 1.0))
        return _svg(figure, name, f"{title}: {', '.join(line.label for line in lines)}")


def dots(name: str, title: str, rows: Sequence[str], lines: Sequence[Line]) -> str:
    """A row of dots for each name, joined by a line; arguments as in :func:`curves`."""
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _figure(0.55 + 0.27 * len(rows))
        for height, row in enumerate(rows):
            found = [(line.values or {}).get(row, float("nan")) for line in lines]
            known = [value for value in found if np.isfinite(value)]
            if known:
                axes.plot([min(known), max(known)], [height] * 2, color=_GRID, linewidth=3)
        for line in lines:
            values = [(line.values or {}).get(row, float("nan")) for row in rows]
            axes.plot(
                values,
                np.arange(len(rows)),
                "o",
                color=line.colour,
                markersize=7.5,
                markerfacecolor=_SURFACE if line.reference else line.colour,
                markeredgewidth=1.8,
            )
        _rows(axes, rows)
        axes.margins(x=0.06)
        axes.set_xlim(_range_of_ap(*axes.get_xlim(), room=0.2))
        return _svg(figure, name, f"{title}: {', '.join(line.label for line in lines)}")


def _range_of_ap(low: float, high: float, *, room: float = 0.0) -> tuple[float, float]:
    """At least ``_LEAST_RANGE`` wide, and none of it below 0 but room for a mark."""
    wider = max(0.0, _LEAST_RANGE - (high - low)) / 2
    lowest = max(low - wider, -room)
    return lowest, max(high + wider, lowest + _LEAST_RANGE)


def _rows(axes: Axes, rows: Sequence[str]) -> None:
    names = [name if len(name) < 24 else f"{name[:22]}…" for name in rows]
    axes.set_yticks(range(len(rows)), names, color=_INK)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.xaxis.get_major_formatter().set_useOffset(False)  # type: ignore[attr-defined]
    axes.grid(axis="x")


def _thousands(value: float, _position: int) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _figure(
    height: float, *, layout: Literal["constrained"] | None = "constrained"
) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout=layout)
    FigureCanvasSVG(figure)
    figure.patch.set_visible(False)
    axes = figure.subplots()
    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, pad=5)
    return figure, axes


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an element of the page: its own ids, and variables in the place of colours."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        # The browser has the letters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(file, format="svg", metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.S)
    svg = re.sub(r"<style.*?</style>\s*", "", svg, flags=re.S)
    used = set(re.findall(r"(?:href=\"|url\()#([^)\"]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for stand_in, variable in (_VARIABLES | _RUNS).items():
        svg = svg.replace(stand_in, f"var(--{variable})")
    label = re.sub(r"[<>&\"\x00-\x1f]", " ", title)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "", svg)
