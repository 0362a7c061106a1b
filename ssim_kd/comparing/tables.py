"""The tables of a study as Markdown."""

import math
from collections.abc import Sequence

from .analysis import Stage, distinct
from .records import METRICS, Record, Records
from .statistics import Difference, Summary, summarise
from .study import AUTO, TEACHER, TUNED, Study


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def arms_table(stage: Stage, study: Study, records: Records) -> str:
    """Mean and SD of each metric, with time and memory, one row an arm."""
    rows = []
    for arm, by_metric in stage.summaries.items():
        found = distinct(stage.records[arm])
        metrics = [_number(by_metric[name].mean, ".1f") for name in METRICS[1:]]
        rows.append(
            [
                arm,
                _weight(arm, study, records),
                str(len({record["teacher"] for record in found if "teacher" in record}) or ""),
                str(len(found)),
                _with_sd(by_metric["AP"]),
                *metrics,
                _mean_of(found, "cpu_seconds"),
                _mean_of(found, "peak_memory_mb"),
            ]
        )
    head = ["arm", "lambda", "teachers", "students", "AP ± SD", *METRICS[1:], "CPU s", "MB"]
    return table(head, rows)


def contrasts_table(stage: Stage) -> str:
    """Paired differences, one row a contrast."""
    primary = any(contrast.p_holm is not None for contrast in stage.contrasts)
    nested = stage.unit == "teacher"
    rows = []
    for contrast in stage.contrasts:
        found = contrast.differences
        row = [
            f"{contrast.arm} − {contrast.against}",
            str(found["AP"].n),
            _interval(found["AP"]),
            f"{found['AP'].p:.4f}" if found["AP"].n > 1 else "",
        ]
        if primary:
            row.append("" if contrast.p_holm is None else f"{contrast.p_holm:.4f}")
        if nested:
            row += [_number(contrast.spread.teachers), _number(contrast.spread.students)]
        rows.append([*row, *(_interval(found[name]) for name in METRICS[1:])])
    head = ["difference", f"{stage.unit}s", "AP [95%]", "p", *(["p (Holm)"] if primary else [])]
    head += ["SD of teachers", "SD of students"] if nested else []
    return table([*head, *METRICS[1:]], rows)


def identical_table(stage: Stage, pairs: Sequence[Sequence[str]]) -> str:
    """Whether two arms came to the same weights, bit for bit, by the hash of the student's."""
    rows = []
    for arm, against in pairs:
        ours, theirs = stage.records.get(arm, {}), stage.records.get(against, {})
        for slot in sorted(ours.keys() & theirs.keys()):
            hashes = [found[slot]["weights_sha256"] for found in (ours, theirs)]
            same = hashes[0] == hashes[1]
            rows.append([f"{arm}, {against}", str(slot[1]), *hashes, _ok(same)])
    return table(["arms", "seed", "SHA-256", "SHA-256", "the same"], rows) if rows else ""


def tuning_table(study: Study, records: Records) -> str:
    """Mean AP on the tuning split, and that of each seed: a row an arm, a column a weight.

    The weight that was frozen is bold.
    """
    found: dict[str, dict[float, list[float]]] = {}
    for key, record in records.runs.items():
        kind, arm, *rest = key.split("/")
        if kind == "tuning":
            by_weight = found.setdefault(arm, {})
            by_weight.setdefault(float(rest[0]), []).append(record["metrics"]["AP"])
    weights = sorted({weight for by_weight in found.values() for weight in by_weight})
    rows = []
    for arm in [arm for arm in study.content["arms"] if arm in found]:
        cells = []
        for weight in weights:
            values = found[arm].get(weight, [])
            bold = "**" if records.tuned.get(arm) == weight else ""
            each = ", ".join(f"{value:.1f}" for value in values)
            cells.append(f"{bold}{summarise(values).mean:.2f}{bold} ({each})" if values else "")
        rows.append([arm, *cells])
    return table(["arm", *(f"{weight:g}" for weight in weights)], rows)


def models_table(study: Study, records: Records) -> str:
    """The teachers and the weights that others start from."""
    rows = []
    for name, run in study.models.items():
        record = records.of(run)
        if record is not None:
            metrics = [_number(record["metrics"][metric], ".1f") for metric in METRICS]
            rows.append(
                [name, run.config.name, str(run.seed), *metrics, _mean_of([record], "cpu_seconds")]
            )
    return table(["model", "config", "seed", *METRICS, "CPU s"], rows)


def gates(stage: Stage, study: Study, records: Records, baseline: str) -> str:
    """What has to hold before arms may be compared, and whether it does."""
    found = stage.summaries[baseline]["AP"]
    last_third = [_last_third(record["curve"]) for record in distinct(stage.records[baseline])]
    moved = summarise([value for value in last_third if value is not None])
    teachers = [
        record["metrics"]["AP"]
        for name in study.content["stages"][stage.name]["design"]["students"]
        if name and (record := records.of(study.models[name])) is not None
    ]
    gap = min(teachers) - found.mean if teachers else math.nan
    rows = [
        ["the worst teacher is at least 5 AP above the plain student", f"{gap:.1f}", _ok(gap >= 5)],
        [
            "the plain student's AP moves by less than 1 over the last third",
            f"{moved.mean:.2f}",
            _ok(abs(moved.mean) < 1),
        ],
        ["its SD over seeds is at most 1.5", _number(found.sd), _ok(found.sd <= 1.5)],
        ["its AP is from 30 to 75", f"{found.mean:.1f}", _ok(30 <= found.mean <= 75)],
    ]
    return table(["gate", "measured", ""], rows)


def _last_third(curve: Sequence[Sequence[float]]) -> float | None:
    """AP at the end less AP at the evaluation nearest to two thirds."""
    if len(curve) < 2:
        return None
    end = curve[-1][0]
    return curve[-1][1] - min(curve[:-1], key=lambda point: abs(point[0] - end * 2 / 3))[1]


def _ok(holds: bool) -> str:
    return "yes" if holds else "**no**"


def _mean_of(found: Sequence[Record], name: str) -> str:
    """The mean of what was measured; a training that was killed has None."""
    values = [record[name] for record in found if record[name] is not None]
    return f"{summarise(values).mean:.0f}" if values else ""


def _weight(arm: str, study: Study, records: Records) -> str:
    content = study.content["arms"][arm]
    weight = content.get("weight")
    if weight is None:
        return "own" if TEACHER in content.get("opts", {}) else ""
    if weight == TUNED:
        return f"{records.tuned[arm]:g} (tuned)"
    return AUTO if weight == AUTO else f"{weight:g}"


def _interval(found: Difference) -> str:
    if found.n < 2 or math.isnan(found.mean):
        return _number(found.mean, "+.2f")
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def _with_sd(found: Summary) -> str:
    return f"**{found.mean:.2f}**" + (f" ± {found.sd:.2f}" if found.n > 1 else "")


def _number(value: float, style: str = ".2f") -> str:
    return "" if math.isnan(value) else f"{value:{style}}"
