"""The page: report.html from runs."""

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import figures, tables
from .columns import Column, Comparison, compare
from .detections import MIN_SCORE
from .runs import Run, read_run


def write_report(
    folders: Sequence[Path],
    output: Path,
    *,
    teacher: Path | None = None,
    control: Path | None = None,
) -> None:
    """Write a page on one training, or on several side by side.

    Args:
        folders: of the trainings; at least one.
        output: the file; replaced.
        teacher, control: folders of the runs to compare with. None: they are looked for, see
            docs/report.md.

    Raises:
        ValueError: a folder is none of a training.
        OSError: the file cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    named = {"teacher": teacher, "control": control}
    others = {name: read_run(folder) for name, folder in named.items() if folder is not None}
    html = render(compare(runs, **others))
    # A page that is open elsewhere is never half a page.
    unfinished = output.with_name(f".{output.name}.unfinished")
    unfinished.write_text(html, encoding="utf-8", errors="replace")
    os.replace(unfinished, output)


def render(page: Comparison) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": tables.number, "signed": tables.signed}
    shown = [column for column in page.columns if not column.is_reference] or page.columns[:1]
    for column in page.columns:
        for problem in column.run.problems:
            section = {"Config": "config", "Environment": "environment"}
            page.note(section.get(problem.split(":")[0], "result"), problem)
    figures.note_ranks(page)
    return environment.get_template("report.html").render(
        page=page,
        title=", ".join(column.label for column in shown),
        subtitle=_subtitle(shown),
        tiles=tables.tiles(page) if len(shown) == 1 else [],
        results=[tables.result_row(page, column) for column in page.columns],
        memory=any(column.run.memory for column in page.columns),
        sets=list(tables.other_sets(page)),
        ap_charts=list(figures.ap_charts(page)),
        size_chart=figures.size_chart(page),
        **figures.class_parts(page),
        **figures.error_parts(page),
        pictures=figures.pictures(page),
        min_score=MIN_SCORE,
        losses=list(figures.curves(page, "losses", figures.loss_names(page))),
        levels=list(figures.curves(page, "levels", figures.level_names(page))),
        speed=list(figures.curves(page, "speed", ("time", "data_time", "lr", "grad_norm"))),
        config=tables.config_rows(page),
        config_columns=tables.config_columns(page),
        environment=tables.environment_rows(page),
        written=f"{datetime.now():%d %B %Y, %H:%M}",
    )


def _subtitle(shown: Sequence[Column]) -> str:
    if len(shown) > 1:
        return f"{len(shown)} trainings side by side"
    run, parts = shown[0].run, []
    terms = run.get("MODEL.DISTILL.TERMS") or [[run.get("MODEL.DISTILL.NAME", default="")]]
    if run.distils and not run.is_lazy:
        parts.append("distilled: " + " + ".join(_term(run, term) for term in terms))
    else:
        parts.append("distilled" if run.distils else "plain, without distillation")
    iterations = run.get("SOLVER.MAX_ITER", "train.max_iter")
    parts += [f"{iterations} iterations"] if iterations else []
    return " · ".join([*parts, *(f"AP on {name}" for name in run.test_sets[-1:])])


def _term(run: Run, term: Sequence[Any]) -> str:
    """A distiller's loss and weight: "SSIM, weight 4"."""
    own = dict(zip(term[1::2], term[2::2], strict=False))
    name = str(term[0])
    if name in ("", "FeatureDistiller"):  # of older runs
        name = str(own.get("LOSS") or run.get("MODEL.DISTILL.LOSS") or "ssim")
        name = "SSIM" if name == "ssim" else name
    weight = own.get("LOSS_WEIGHT", run.get("MODEL.DISTILL.LOSS_WEIGHT"))
    shown = f"{weight:g}" if isinstance(weight, int | float) else weight  # "auto"
    return name.removesuffix("Distiller") + (f", weight {shown}" if weight is not None else "")
