"""What a study's records come to: a summary of each arm, and each contrast of two arms."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .records import METRICS, Record, Records
from .statistics import Difference, Summary, holm, paired_difference, summarise
from .study import Study


@dataclass(frozen=True)
class Contrast:
    """One arm against another, paired by seed (and so by teacher).

    Attributes:
        arm, against: names of arms.
        differences: of each metric, arm minus against.
        seeds: those that both have.
        p_holm: p of the AP, adjusted over the primary contrasts; None where it is not one.
    """

    arm: str
    against: str
    differences: Mapping[str, Difference]
    seeds: Sequence[int]
    p_holm: float | None = None


@dataclass(frozen=True)
class Stage:
    """A stage of a study, as far as it has been run.

    Attributes:
        name: of the stage.
        title: what it asks.
        records: of each arm, by seed.
        summaries: of each arm and metric.
        contrasts: those that the stage asks for and that have a pair.
        planned: number of trainings that it asks for.
    """

    name: str
    title: str
    records: Mapping[str, Mapping[int, Record]]
    summaries: Mapping[str, Mapping[str, Summary]]
    contrasts: Sequence[Contrast]
    planned: int

    @property
    def finished(self) -> int:
        """Number of trainings that have a record."""
        return sum(len(by_seed) for by_seed in self.records.values())


def analyse(study: Study, records: Records) -> list[Stage]:
    """Every stage of a study."""
    return [_stage(study, name, records) for name in study.content["stages"]]


def as_dict(stage: Stage) -> dict[str, Any]:
    """The figures of a stage, for a JSON file: rounded, and None for NaN."""
    return {
        "arms": {
            arm: {name: _plain(asdict(found)) for name, found in by_metric.items()}
            for arm, by_metric in stage.summaries.items()
        },
        "contrasts": [
            {
                "arm": c.arm,
                "against": c.against,
                "seeds": list(c.seeds),
                "p_holm": c.p_holm,
                "differences": {name: _plain(asdict(d)) for name, d in c.differences.items()},
            }
            for c in stage.contrasts
        ],
    }


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(x) else round(x, 4) for name, x in values.items()}


def _stage(study: Study, name: str, records: Records) -> Stage:
    content = study.content["stages"][name]
    runs = study.stage(name, records.tuned)
    found: dict[str, dict[int, Record]] = {}
    for run in runs:
        record = records.of(run)
        if record is not None:
            found.setdefault(run.arm, {})[run.seed] = record
    summaries = {
        arm: {
            metric: summarise([record["metrics"][metric] for record in by_seed.values()])
            for metric in METRICS
        }
        for arm, by_seed in found.items()
    }
    contrasts = [
        _contrast(found, arm, against)
        for arm, against in content.get("contrasts", [])
        if found.get(arm, {}).keys() & found.get(against, {}).keys()
    ]
    primary = [tuple(pair) for pair in content.get("primary", [])]
    # Adjusted for all that were planned, run or not.
    p_values = dict.fromkeys(primary, 1.0)
    p_values |= {
        (c.arm, c.against): c.differences["AP"].p
        for c in contrasts
        if (c.arm, c.against) in p_values
    }
    adjusted = holm({"/".join(pair): p for pair, p in p_values.items()})
    contrasts = [
        Contrast(c.arm, c.against, c.differences, c.seeds, adjusted.get(f"{c.arm}/{c.against}"))
        for c in contrasts
    ]
    planned = len(content["arms"]) * len(content["seeds"])
    return Stage(name, content.get("title", name), found, summaries, contrasts, planned)


def _contrast(found: Mapping[str, Mapping[int, Record]], arm: str, against: str) -> Contrast:
    seeds = sorted(found[arm].keys() & found[against].keys())
    differences = {
        metric: paired_difference(
            [found[arm][s]["metrics"][metric] - found[against][s]["metrics"][metric] for s in seeds]
        )
        for metric in METRICS
    }
    return Contrast(arm, against, differences, seeds)
