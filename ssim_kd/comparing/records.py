"""The results of a study in one JSON file: request, metrics and machine of each training."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .study import Run

#: Measured by detectron2, 0 to 100; "small" and "large" are added by :mod:`.measuring`.
METRICS = ("AP", "AP50", "AP75", "small", "large")
Record = dict[str, Any]


class Records:
    """The records of a study, saved after each change.

    Args:
        path: of the JSON file; read if it is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = json.loads(path.read_text()) if path.is_file() else {}
        self.runs: dict[str, Record] = content.get("runs", {})
        self.tuned: dict[str, float] = content.get("tuned", {})
        self.machines: list[dict[str, Any]] = content.get("machines", [])
        self.statistics: dict[str, Any] = content.get("statistics", {})

    def of(self, run: Run) -> Record | None:
        """The record of a training that was asked for in just this way, or None."""
        record = self.runs.get(run.key)
        return record if record and record["fingerprint"] == run.fingerprint[:16] else None

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Those that have no record yet."""
        return [run for run in runs if self.of(run) is None]

    def add(self, run: Run, measured: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
        """Keep what a training came to, and save."""
        if machine not in self.machines:
            self.machines.append(dict(machine))
        self.runs[run.key] = {
            "fingerprint": run.fingerprint[:16],
            "config": run.config.name,
            "opts": dict(run.opts),
            "seed": run.seed,
            **{
                name: value for name in ("arm", "teacher", "start") if (value := getattr(run, name))
            },
            **measured,
            "machine": self.machines.index(dict(machine)),
        }
        self.save()

    def save(self) -> None:
        """Write the file, whole or not at all: one line a record."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        runs = ",\n".join(
            f" {json.dumps(key)}: {json.dumps(self.runs[key])}" for key in sorted(self.runs)
        )
        statistics = ",\n".join(
            f" {json.dumps(name)}: {json.dumps(found)}" for name, found in self.statistics.items()
        )
        machines = ",\n".join(f" {json.dumps(machine)}" for machine in self.machines)
        text = (
            f'{{"tuned": {json.dumps(self.tuned)},\n"machines": [\n{machines}],\n'
            f'"statistics": {{\n{statistics}}},\n'
            f'"runs": {{\n{runs}}}}}\n'
        )
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(text)
        os.replace(unfinished, self.path)
