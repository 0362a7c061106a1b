"""The plots of a study."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .analysis import Stage, distinct


def differences(stage: Stage) -> Figure:
    """Paired differences in AP: each unit a dot, the mean with its interval a bar."""
    figure, axes = _figure(6.4, 0.9 + 0.45 * len(stage.contrasts))
    for row, contrast in enumerate(stage.contrasts):
        found = contrast.differences["AP"]
        axes.plot(contrast.each, np.full(found.n, row), "o", color="0.6", markersize=4, alpha=0.7)
        if found.n > 1:
            half = found.high - found.mean
            axes.errorbar(found.mean, row, xerr=half, fmt="D", color="C0", capsize=4, markersize=5)
        else:
            axes.plot(found.mean, row, "D", color="C0", markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    labels = [f"{contrast.arm} − {contrast.against}" for contrast in stage.contrasts]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel(f"difference in AP, a dot a {stage.unit}; bar: 95% interval of the mean")
    return figure


def curves(stage: Stage) -> Figure:
    """AP over iterations: the mean over students, and one SD to either side."""
    figure, axes = _figure(6.4, 3.8)
    for number, (arm, by_slot) in enumerate(stage.records.items()):
        points: dict[int, list[float]] = {}
        found = distinct(by_slot)
        for record in found:
            for iteration, value in record["curve"]:
                points.setdefault(iteration, []).append(value)
        x = sorted(points)
        mean = np.array([np.mean(points[i]) for i in x])
        sd = np.array([np.std(points[i], ddof=1) if len(points[i]) > 1 else 0.0 for i in x])
        axes.plot(x, mean, "o-", color=f"C{number}", markersize=3, label=f"{arm} ({len(found)})")
        axes.fill_between(x, mean - sd, mean + sd, color=f"C{number}", alpha=0.15, linewidth=0)
    axes.set_xlabel("iteration")
    axes.set_ylabel("AP, mean ± SD over students")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", alpha=0.2)
    return figure, axes
