"""The tables of the page, and the figures at its top."""

from collections.abc import Iterable
from itertools import chain
from statistics import median
from typing import Any

from detectron2.config import get_cfg

from ..config import add_distill_config, add_shared_keys
from ..metrics_file import Series
from .columns import Column, Comparison
from .runs import flatten

#: Sizes of boxes, by Detectron2's name of their AP.
SIZES = {"APs": "small", "APm": "medium", "APl": "large"}
#: A sentence of the page.
WORSE_TEACHER = "The teacher has a lower AP than the student: look for a better one."
#: The AP of a table's columns.
AP_COLUMNS = ("AP", "AP50", "AP75", *SIZES)


def number(value: float | None) -> str:
    """A figure with one decimal, two digits if it would show as 0; a dash if unknown."""
    if value is None or value != value:
        return "–"
    return (f"{value:.2g}" if 0 < abs(value) < 0.05 else f"{value:.1f}").replace("-", "−")


def signed(value: float | None) -> str:
    """A difference with its sign, "0.0" if there is none to see; or a dash."""
    if value is None or value != value:
        return "–"
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}".replace("-", "−")


def tiles(page: Comparison) -> list[tuple[str, str, str]]:
    """Label, value and remark of the figures at the top, for one run."""
    own, before = page.columns[0], page.of_role("control", "start")
    teacher = page.of_role("teacher")
    ap, tiles = own.ap.get("AP"), []
    if ap is not None:
        best = _best(own)
        tiles.append(("Box AP", number(ap), f"best {best}" if best else ""))
    if ap is not None and before is not None and "AP" in before.ap:
        name = "control" if before.role == "control" else "start"
        remark = f"{before.label} has {number(before.ap['AP'])}"
        tiles.append((f"Against the {name}", signed(ap - before.ap["AP"]), remark))
    if teacher is not None and "AP" in teacher.ap:
        remark = ""
        if ap is not None:
            gap = teacher.ap["AP"] - ap
            place = "above" if gap > 0 else "below"
            remark = f"{number(abs(gap))} {place} the student" if abs(gap) >= 0.05 else ""
            if gap <= -0.05:
                page.note("result", WORSE_TEACHER)
            start = before.ap.get("AP", ap) if before is not None else ap
            if start < ap < teacher.ap["AP"]:
                share = (ap - start) / (teacher.ap["AP"] - start)
                remark = f"{share:.0%} of the gap to it is closed"
        tiles.append(("Teacher's AP", number(teacher.ap["AP"]), remark))
    facts = result_row(page, own)
    if facts["seconds"] is not None:
        remark = f"{facts['data']:.0%} of it waiting for data"
        tiles.append(("Seconds an iteration", f"{facts['seconds']:.3g}", remark))
    if facts["memory"]:
        tiles.append(("Peak GPU memory", f"{facts['memory']} MiB", "as PyTorch counts it"))
    return tiles


def _best(column: Column) -> str:
    """The AP of model_best.pth, which the first test set chose."""
    chosen, shown = (column.run.boxes(i).get("AP", Series()).finite() for i in (0, -1))
    if len(chosen) < 2:
        return ""
    iteration, _ = max(chosen, key=lambda pair: pair[::-1])
    return f"{number(dict(shown).get(iteration))} at {iteration}"


def result_row(page: Comparison, column: Column) -> dict[str, Any]:
    """A row of the first table."""
    before = page.of_role("control", "start")
    run, series = column.run, column.run.series
    facts: dict[str, Any] = {"column": column, "ap": [column.ap.get(n) for n in AP_COLUMNS]}
    facts["best"] = _best(column) if column.role != "teacher" else ""
    facts["gain"] = None
    if before is not None and "AP" in before.ap and not column.is_reference and column.ap:
        facts["gain"] = column.ap["AP"] - before.ap["AP"]
    times = [v for _, v in series.get("time", Series()).finite()]
    waits = [v for _, v in series.get("data_time", Series()).finite()]
    facts["seconds"] = median(times) if times else None
    facts["data"] = median(waits) / median(times) if times and waits and median(times) else 0.0
    batch = run.get("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size")
    facts["images"] = batch / facts["seconds"] if batch and facts["seconds"] else None
    facts["memory"] = run.memory
    if not times:
        page.note("speed", f"Speed of {column.label}: not available: no metrics.json with times")
    if run.memory is None:
        if run.get("MODEL.DEVICE", "train.device") == "cpu":
            page.note("speed", "Peak GPU memory: not available: trained on the CPU")
        else:
            reason = "run.json has none"
            page.note("speed", f"Peak GPU memory of {column.label}: not available: {reason}")
    return facts


def other_sets(page: Comparison) -> Iterable[tuple[str, str, str, list[float | None]]]:
    """Label, set, task and figures of all evaluations but that of the boxes on the last set."""
    for column in page.columns:
        last = column.run.test_sets[-1] if column.run.test_sets else ""
        for (name, task), series in column.run.evaluations().items():
            if (name, task) == (last, "bbox"):
                continue
            values = [series[n].values[-1] if n in series else None for n in AP_COLUMNS]
            if any(value is not None for value in values):
                yield column.label, name, task, values


def config_rows(page: Comparison) -> list[tuple[str, list[str], str, bool]]:
    """Key, value by run, default, and whether runs differ: what is not Detectron2's or our default.

    Of a LazyConfig, which has no defaults, what runs differ in.
    """
    defaults = get_cfg()
    add_distill_config(defaults)
    add_shared_keys(defaults)
    usual = flatten(defaults)
    columns = config_columns(page)
    rows = []
    for key in sorted(set(chain.from_iterable(c.run.config for c in columns))):
        # A key that came later had its default.
        values = [c.run.config.get(key, usual.get(key, _MISSING)) for c in columns]
        unlike = any(value != values[0] for value in values)
        lazy = [c.run.is_lazy for c in columns]
        unusual = any(
            not is_lazy and value is not _MISSING and value != usual.get(key, _MISSING)
            for value, is_lazy in zip(values, lazy, strict=True)
        )
        if unusual or (unlike and len(columns) > 1):
            texts = [_text(value) for value in values]
            rows.append((key, texts, _text(usual.get(key, _MISSING)), unlike))
    if any(c.run.is_lazy for c in columns):
        page.note("config", "A LazyConfig has no defaults: its file below is all that is known.")
    # What runs differ in comes first.
    return sorted(rows, key=lambda row: not row[3])


_MISSING = object()


def config_columns(page: Comparison) -> list[Column]:
    """The runs whose configs are compared: not the teacher and the start, other trainings."""
    return [c for c in page.columns if c.run.config and c.role not in ("teacher", "start")]


def _text(value: Any) -> str:
    if value is _MISSING:
        return "–"
    return "''" if value == "" else str(value)


def environment_rows(page: Comparison) -> list[tuple[str, list[str]]]:
    """Key and value by run, of the last start."""
    keys = list(dict.fromkeys(k for c in page.columns for k in c.run.environment))
    rows = [(key, [c.run.environment.get(key, "–") for c in page.columns]) for key in keys]
    commits = [column.run.commit for column in page.columns]
    for column in page.columns:
        if not column.run.commit and column.run.environment:
            page.note("environment", f"Commit of {column.label}: not available: it was no checkout")
    if any(commits):
        rows.insert(0, ("ssim_kd, commit", [commit or "–" for commit in commits]))
    return rows
