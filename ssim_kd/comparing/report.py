"""The page of a study, with its tables and plots, written from the records."""

import os
import shlex
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from . import tables
from .analysis import Stage, analyse, as_dict, distinct
from .records import Records
from .study import Study


def write_report(study: Study, records: Records, page: Path | None) -> None:
    """Write the statistics into the records, and a page with plots next to it.

    Args:
        study: what was asked for.
        records: what came out.
        page: a Markdown file; None takes ``NAME.md`` next to the records.
    """
    if not records.runs:
        return
    page = page or records.path.with_suffix(".md")
    stages = [stage for stage in analyse(study, records) if _answers(study, stage)]
    records.statistics = {stage.name: as_dict(stage) for stage in stages}
    records.save()
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(_page(study, records, stages, page))
    print(f"{records.path}\n{page}")


def _page(study: Study, records: Records, stages: list[Stage], page: Path) -> str:
    parts = [f"# {study.content.get('title', study.name)}\n", _included(study, "findings")]
    sets = sorted({record["test_set"] for record in records.runs.values() if "test_set" in record})
    parts += [f"Box AP on {', '.join(sets)} after the last iteration.\n"] if sets else []
    if study.models:
        parts += ["## Models\n", tables.models_table(study, records)]
    for stage in stages:
        parts += [f"## {stage.title}\n", _asked(study, stage)]
        asked = study.content["stages"][stage.name]
        baseline = asked.get("gates")
        if baseline in stage.summaries:
            parts.append(tables.gates(stage, study, records, baseline))
        parts.append(tables.arms_table(stage, study, records))
        parts.append(tables.identical_table(stage, asked.get("identical", [])))
        if stage.contrasts:
            parts.append(tables.contrasts_table(stage))
            parts.append(_picture(differences_plot(stage), page, f"{study.name}_{stage.name}"))
        if stage.contrasts or baseline in stage.summaries:
            parts.append(_picture(curves_plot(stage), page, f"{study.name}_{stage.name}_curves"))
    if any(key.startswith("tuning/") for key in records.runs):
        parts += ["## Tuning\n", _included(study, "tuning"), tables.tuning_table(study, records)]
    shown = {stage.name for stage in stages}
    missing = [stage for stage in analyse(study, records) if stage.name not in shown]
    if missing:
        lines = [f"- {s.title}: {s.finished} of {s.planned} trainings\n" for s in missing]
        parts.append("## Not run\n\n" + "".join(lines))
    parts += [_included(study, "recipe"), _provenance(study, records, page)]
    return "\n".join(part for part in parts if part)


def _asked(study: Study, stage: Stage) -> str:
    note = study.content["stages"][stage.name].get("note", "")
    left = stage.planned - stage.finished
    lines = [note.strip()] if note else []
    if left:
        lines.append(f"{stage.finished} of {stage.planned} trainings are finished.")
    return "\n\n".join(lines) + "\n" if lines else ""


def _answers(study: Study, stage: Stage) -> bool:
    """Whether enough of a stage has been run to say something."""
    asked = study.content["stages"][stage.name]
    pairs = [*asked.get("contrasts", []), *asked.get("identical", [])]
    pairs = [pair for pair in pairs if set(pair) <= stage.records.keys()]
    return bool(pairs) or asked.get("gates") in stage.records or stage.finished == stage.planned


def _included(study: Study, name: str) -> str:
    """The text of a file that the study names under "texts"."""
    path = study.content.get("texts", {}).get(name)
    return (study.path.parent / path).read_text() if path else ""


def _picture(figure: Figure, page: Path, name: str) -> str:
    path = page.parent / "assets" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return f"![{name.replace('_', ' ')}](assets/{path.name})\n"


def _provenance(study: Study, records: Records, page: Path) -> str:
    commits = sorted({record["commit"] for record in records.runs.values()})
    hours = sum(record["cpu_seconds"] or 0 for record in records.runs.values()) / 3600
    where = [
        f"- {m['gpu'] or m['processor']}, OMP_NUM_THREADS={m['threads'] or 'unset'}, "
        f"Python {m['python']}, torch {m['torch']}, torchvision {m['torchvision']}"
        for m in records.machines
    ]
    paths = [path.resolve() for path in (study.path, page, records.path)]
    root = os.path.commonpath([path.parent for path in paths])
    relative = [shlex.quote(os.path.relpath(path, root)) for path in paths]
    command = f"ssim-kd compare {relative[0]} --docs {relative[1]}"
    return "\n".join(
        [
            "## Where the figures come from\n",
            f"`{command}` trains what has no record in "
            f"`{relative[2]}` and writes this page from it; with `--report` it only writes. Do not "
            "edit this page.\n",
            f"{len(records.runs)} trainings, {hours:.1f} hours of processor time, commit "
            f"{', '.join(commits)}. CPU s is the processor time of a training with its start and "
            "its evaluations; MB is the most memory it held. Differences are paired by teacher and "
            "seed. With teachers as units the students of a teacher are averaged first, and mean, "
            "SD, 95% t interval and the exact two-sided sign-flip p are over teachers (n units "
            "give a p of 2 / 2^n at least); an arm without a teacher has its SD over seeds. SD of "
            "teachers and SD of students are the two parts of the variance of the differences in "
            "AP. With students as units the interval is over the students of these teachers, and "
            "says nothing of another teacher.\n",
            *where,
            "",
        ]
    )


def differences_plot(stage: Stage) -> Figure:
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


def curves_plot(stage: Stage) -> Figure:
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
