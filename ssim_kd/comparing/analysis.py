"""What a study's records come to: a summary of each arm, and each contrast of two arms."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any

from .records import METRICS, Record, Records
from .statistics import Difference, Spread, Summary, holm, paired_difference, spread, summarise
from .study import Slot, Study


@dataclass(frozen=True)
class Contrast:
    """One arm against another, paired by teacher and seed.

    Attributes:
        arm, against: names of arms.
        differences: of each metric, arm minus against, over the units of the stage's design.
        slots: those that both have.
        each: the difference in AP of each unit.
        spread: of the differences in AP of all slots.
        p_holm: p of the AP, adjusted over the primary contrasts; None if it is not one.
    """

    arm: str
    against: str
    differences: Mapping[str, Difference]
    slots: Sequence[Slot]
    each: Sequence[float]
    spread: Spread
    p_holm: float | None = None


@dataclass(frozen=True)
class Stage:
    """A stage of a study, as far as it has been run.

    Attributes:
        name: of the stage.
        title: what it asks.
        unit: "teacher" or "student": what means and intervals are over.
        records: of each arm, by teacher and seed.
        summaries: of each arm and metric, over units; an arm without a teacher, over seeds.
        contrasts: those that the stage asks for and that have a pair.
        planned: number of trainings that it asks for.
    """

    name: str
    title: str
    unit: str
    records: Mapping[str, Mapping[Slot, Record]]
    summaries: Mapping[str, Mapping[str, Summary]]
    contrasts: Sequence[Contrast]
    planned: int

    @property
    def finished(self) -> int:
        """Number of trainings that have a record."""
        return sum(len(distinct(by_slot)) for by_slot in self.records.values())


def distinct(by_slot: Mapping[Slot, Record]) -> list[Record]:
    """The records of an arm, each once: slots of a seed share one without a teacher."""
    return list({(r.get("teacher"), r["seed"]): r for r in by_slot.values()}.values())


def by_unit(unit: str, values: Mapping[Slot, float]) -> list[float]:
    """One value a unit: the students themselves, or the mean over each teacher's."""
    return list(values.values()) if unit == "student" else [mean(g) for g in by_teacher(values)]


def by_teacher(values: Mapping[Slot, float]) -> list[list[float]]:
    """The values of each teacher's students."""
    groups: dict[str, list[float]] = {}
    for (teacher, _), value in values.items():
        groups.setdefault(teacher, []).append(value)
    return list(groups.values())


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
                "slots": list(c.slots),
                "p_holm": c.p_holm,
                "spread": _plain(asdict(c.spread)),
                "differences": {name: _plain(asdict(d)) for name, d in c.differences.items()},
            }
            for c in stage.contrasts
        ],
    }


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(x) else round(x, 4) for name, x in values.items()}


def _stage(study: Study, name: str, records: Records) -> Stage:
    content = study.content["stages"][name]
    unit = content["design"]["unit"]
    runs = study.stage(name, records.tuned)
    found: dict[str, dict[Slot, Record]] = {}
    for arm, by_slot in runs.items():
        for slot, run in by_slot.items():
            record = records.of(run)
            if record is not None:
                found.setdefault(arm, {})[slot] = record
    summaries = {
        arm: {metric: summarise(_values(unit, by_slot, metric)) for metric in METRICS}
        for arm, by_slot in found.items()
    }
    contrasts = [
        _contrast(unit, found, arm, against)
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
    contrasts = [replace(c, p_holm=adjusted.get(f"{c.arm}/{c.against}")) for c in contrasts]
    # Arms whose weight is still to be tuned are planned as well.
    everything = study.stage(name, dict.fromkeys(content["arms"], 1.0))
    planned = {run.key for by_slot in everything.values() for run in by_slot.values()}
    title = content.get("title", name)
    return Stage(name, title, unit, found, summaries, contrasts, len(planned))


def _values(unit: str, by_slot: Mapping[Slot, Record], metric: str) -> list[float]:
    if not any(record.get("teacher") for record in by_slot.values()):
        return [record["metrics"][metric] for record in distinct(by_slot)]
    return by_unit(unit, {slot: record["metrics"][metric] for slot, record in by_slot.items()})


def _contrast(
    unit: str, found: Mapping[str, Mapping[Slot, Record]], arm: str, against: str
) -> Contrast:
    slots = [slot for slot in found[arm] if slot in found[against]]

    def each(metric: str) -> dict[Slot, float]:
        ours, theirs = ({s: found[a][s]["metrics"][metric] for s in slots} for a in (arm, against))
        return {slot: ours[slot] - theirs[slot] for slot in slots}

    differences = {metric: paired_difference(by_unit(unit, each(metric))) for metric in METRICS}
    ap = each("AP")
    return Contrast(arm, against, differences, slots, by_unit(unit, ap), spread(by_teacher(ap)))
