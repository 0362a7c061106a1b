"""The charts and pictures of the page."""

from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from ..metrics_file import Series
from ..modeling.map_rank import TEACHER_RANK
from . import charts
from .columns import Column, Comparison
from .detections import choose_images, draw_boxes, draw_image
from .errors import KINDS
from .tables import SIZES

# Pictures of detections, and most rows of a chart by class.
_IMAGES, _CLASSES = 4, 24


def _line(column: Column, series: Series) -> charts.Line:
    return charts.Line(column.label, column.number, series, reference=column.is_reference)


def ap_charts(page: Comparison) -> Iterable[tuple[str, Markup]]:
    """Title and chart of AP by iteration."""
    for metric in ("AP", "AP50", "AP75"):
        known = [(c, c.run.boxes().get(metric)) for c in page.columns if c.ap]
        lines = [_line(c, s) for c, s in known if s and c.role not in ("teacher", "start")]
        if not lines:
            continue
        # The training of teacher and start is another one: levels, not curves.
        lines += [
            charts.Line(column.label, column.number, level=column.ap[metric], reference=True)
            for column in page.columns
            if column.role in ("teacher", "start") and _known(column.ap, metric)
        ]
        name = f"ap-{metric.lower()}"
        yield metric, Markup(charts.curves(name, f"{metric} by iteration", lines, evaluations=True))


def _value_lines(page: Comparison, names: dict[str, str]) -> list[charts.Line]:
    return [
        charts.Line(
            *(c.label, c.number),
            values={row: c.ap[name] for name, row in names.items() if name in c.ap},
            reference=c.is_reference,
        )
        for c in page.columns
        if c.ap
    ]


def size_chart(page: Comparison) -> Markup | None:
    """AP by size of the boxes."""
    lines = _value_lines(page, SIZES)
    rows = [s for s in SIZES.values() if any(_known(line.values, s) for line in lines)]
    if not rows:
        page.note("ap", "AP by size: not available: no evaluation with such boxes")
        return None
    return Markup(charts.dots("by-size", "AP by size of the boxes", rows, lines))


def _known(values: Any, name: str) -> bool:
    return name in values and values[name] == values[name]


def class_parts(page: Comparison) -> dict[str, Any]:
    """The chart and the table by class, of the first run's classes; highest AP first."""
    own, before = page.columns[0], page.of_role("control", "start")
    names = {k: k.removeprefix("AP-") for k in own.ap if k.startswith("AP-")}
    if not names:
        reason = "one class, or no detections" if own.ap else "no evaluation"
        page.note("ap", f"AP by class: not available: {reason}")
        return {"class_chart": None, "class_rows": [], "class_note": ""}

    def rank(name: str) -> tuple[bool, float]:
        value = own.ap[name]
        return value != value, -value  # NaN last

    ordered = sorted(names, key=rank)
    drawn, note = [n for n in ordered if own.ap[n] == own.ap[n]], ""
    if len(drawn) > _CLASSES:
        half, all_drawn = _CLASSES // 2, len(drawn)
        note = f"The {half} classes of {all_drawn} with the highest and the lowest AP."
        if before is not None and before.ap:
            drawn.sort(key=lambda n: before.ap.get(n, own.ap[n]) - own.ap[n])
            note = f"The {half} classes of {all_drawn} that gained and lost most."
        drawn = drawn[:half] + drawn[-half:]
    rows = []
    for name in ordered:
        gain = own.ap[name] - before.ap[name] if before and name in before.ap else None
        rows.append((names[name], [c.ap.get(name) for c in page.columns], gain))
    chart = None
    if drawn:
        lines = _value_lines(page, names)
        chart = Markup(charts.dots("by-class", "AP by class", [names[n] for n in drawn], lines))
    return {"class_chart": chart, "class_rows": rows, "class_note": note}


def error_parts(page: Comparison) -> dict[str, Any]:
    """The chart and the table of errors."""
    known = [column for column in page.columns if column.detections]
    lines = [
        charts.Line(
            *(c.label, c.number),
            values=c.detections.errors.costs,  # type: ignore[union-attr]
            reference=c.is_reference,
        )
        for c in known
    ]
    chart = None
    if lines:
        title = "AP50 that each kind of error costs"
        chart = Markup(charts.bars("errors", title, list(KINDS), lines))
    return {"error_chart": chart, "error_columns": known, "kinds": KINDS}


def pictures(page: Comparison) -> list[dict[str, Any]]:
    """Some images, each with the boxes of the ground truth and of every run."""
    known = [column for column in page.columns if column.detections]
    if not known or page.truth is None:
        return []
    numbers = choose_images(page.truth, _IMAGES)
    if not numbers:
        page.note("pictures", "Detections side by side: not available: the test set has no boxes")
    found = []
    for number in numbers:
        what = "A picture"
        image = page.attempt("pictures", what, draw_image, page.test_set, page.truth, number)
        if image is not None:
            panels = [(c, draw_boxes(page.truth, c.detections, number)) for c in known]  # type: ignore[arg-type]
            found.append({**image, "number": number, "panels": panels})
    return found


def _names(page: Comparison) -> list[str]:
    """Of all metrics, without those of the teacher's and the start's own trainings."""
    return sorted(
        {name for c in page.columns if c.role not in ("teacher", "start") for name in c.run.series}
    )


def loss_names(page: Comparison) -> list[str]:
    """The terms of the loss."""
    found = [n for n in _names(page) if n.startswith("loss") and "/" not in n]
    return ["total_loss", *sorted(found, key=lambda n: (n != "loss_distill", n))]


def level_names(page: Comparison) -> list[str]:
    """What the distillers log of each level."""
    found = [n for n in _names(page) if n.startswith("distill/")]
    return [n for n in found if not n.endswith("_weighted")]


def note_ranks(page: Comparison) -> None:
    """Say how many directions of its channels the teacher uses, level by level."""
    for column in page.columns:
        ranks = [
            f"{name.removeprefix(TEACHER_RANK)} {series.values[-1]:.1f}"
            for name, series in sorted(column.run.series.items())
            if name.startswith(TEACHER_RANK)
        ]
        if ranks and column.role != "teacher":
            page.note(
                "levels",
                f"Effective rank of the maps that taught {column.label}: {', '.join(ranks)}. "
                "docs/teachers.md says how to read it",
            )


def curves(page: Comparison, section: str, names: Sequence[str]) -> Iterable[tuple[str, Markup]]:
    """Title and chart of each metric that a run has."""
    for index, name in enumerate(names):
        known = [(c, c.run.series.get(name)) for c in page.columns]
        lines = [_line(c, s) for c, s in known if s and c.role not in ("teacher", "start")]
        if not lines:
            continue
        for line in lines:
            assert line.series is not None
            lost = len(line.series.values) - len(line.series.finite())
            if lost:
                page.note(section, f"{name} of {line.label}: {lost} values are not finite")
        drawn = Markup(charts.curves(f"{section}-{index}", name, lines))
        yield name.removeprefix("distill/"), drawn
