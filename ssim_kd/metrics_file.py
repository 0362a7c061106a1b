"""Reads the metrics.json of a training."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

#: Of a training, in its OUTPUT_DIR.
METRICS_FILE = "metrics.json"
# Detectron2's COCOEvaluator has NaN if nothing is detected.
_BOX_AP = re.compile(r"(?:.+/)?bbox/AP(?:50|75)?", re.S)


@dataclass
class Series:
    """A metric over the training: one value an iteration, iterations growing."""

    iterations: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, iteration: int, value: float) -> None:
        """Add a value; what is known of this iteration and of later ones is out of date."""
        self.cut(iteration - 1)
        self.iterations.append(iteration)
        self.values.append(value)

    def cut(self, last: int) -> None:
        """Forget what comes after an iteration."""
        while self.iterations and self.iterations[-1] > last:
            self.iterations.pop()
            self.values.pop()

    def pairs(self) -> list[tuple[int, float]]:
        """The pairs of iteration and value."""
        return list(zip(self.iterations, self.values, strict=True))

    def finite(self) -> list[tuple[int, float]]:
        """The pairs of iteration and value whose value is finite."""
        return [(i, v) for i, v in self.pairs() if math.isfinite(v)]


@dataclass
class Metrics:
    """What a metrics.json holds.

    Attributes:
        series: by the name of the metric; without an entry for what was never written.
        lines: that are not empty.
        damaged: lines among them that cannot be read, as the last one while it is being written.
    """

    series: dict[str, Series] = field(default_factory=dict)
    lines: int = 0
    damaged: int = 0


def read_metrics(folder: Path) -> Metrics:
    """Read the metrics of a training. If it was resumed, each iteration counts once.

    A box AP without a number is 0: nothing was detected.

    Args:
        folder: of the training, its OUTPUT_DIR.

    Raises:
        OSError: it has no metrics.json, or one that cannot be read.
    """
    text = (folder / METRICS_FILE).read_text(encoding="utf-8", errors="replace")
    rows = [_row(line) for line in text.splitlines() if line.strip()]
    return Metrics(_merge([row for row in rows if row]), len(rows), rows.count(None))


def _row(line: str) -> dict[str, float] | None:
    try:
        found = json.loads(line)
        row = {str(k): float(v) for k, v in found.items() if isinstance(v, int | float)}
        row |= {k: 0.0 for k, v in row.items() if math.isnan(v) and _BOX_AP.fullmatch(k)}
        row["iteration"] = int(row["iteration"])
        return row
    except (ValueError, AttributeError, KeyError, OverflowError, RecursionError):
        return None


def _merge(rows: Sequence[Mapping[str, float]]) -> dict[str, Series]:
    """Series by name. A run that was resumed wrote the iterations since its checkpoint twice.

    Of values that come twice the later one counts, and what an earlier part of the run wrote of
    later iterations is out of date. The rows themselves are in no order: Detectron2 writes those of
    several iterations at a time, such as an evaluation after the losses of later steps. A new part
    begins when a metric of this part has an earlier iteration.
    """
    series: dict[str, Series] = {}
    part: set[str] = set()
    for row in rows:
        iteration = int(row["iteration"])
        names = row.keys() - {"iteration"}
        if any(series[name].iterations[-1:] >= [iteration] for name in names & part):
            part = set()
            for known in series.values():
                known.cut(iteration)
        part |= names
        for name in names:
            series.setdefault(name, Series()).add(iteration, row[name])
    return {name: known for name, known in series.items() if known.iterations}
