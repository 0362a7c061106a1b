"""The committed results: their statistics follow from their records."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from ssim_kd.comparing.records import METRICS, Records
from ssim_kd.comparing.study import read_study

STUDIES = Path(__file__).resolve().parents[2] / "studies"
FILES = sorted(STUDIES.glob("results/*.json"))


def over_units(found: dict[tuple[str, int], float], unit: str) -> np.ndarray:
    """One value a student, or the mean over the students of each teacher."""
    if unit == "student":
        return np.array(list(found.values()))
    teachers = dict.fromkeys(teacher for teacher, _ in found)
    return np.array([np.mean([x for (t, _), x in found.items() if t == name]) for name in teachers])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_statistics_follow_from_the_records(path: Path) -> None:
    study, records = read_study(STUDIES / f"{path.stem}.yaml"), Records(path)
    assert records.statistics
    for name, found in records.statistics.items():
        unit = study.content["stages"][name]["design"]["unit"]
        keys = {
            arm: {slot: run.key for slot, run in by_slot.items() if records.of(run)}
            for arm, by_slot in study.stage(name, records.tuned).items()
        }
        assert {arm for arm, by_slot in keys.items() if by_slot} == set(found["arms"])
        for arm, by_metric in found["arms"].items():
            for metric in METRICS:
                each = {s: records.runs[key]["metrics"][metric] for s, key in keys[arm].items()}
                values = over_units(each, unit)
                if study.content["arms"][arm].get("weight") is None:  # no teacher: over seeds
                    values = np.array(list({seed: x for (_, seed), x in each.items()}.values()))
                assert by_metric[metric]["n"] == len(values)
                assert by_metric[metric]["mean"] == pytest.approx(values.mean(), abs=1e-3)
                if len(values) > 1:
                    sd = np.std(values, ddof=1)
                    assert by_metric[metric]["sd"] == pytest.approx(sd, abs=1e-3)
        for contrast in found["contrasts"]:
            ours, theirs = keys[contrast["arm"]], keys[contrast["against"]]
            slots = [tuple(slot) for slot in contrast["slots"]]
            assert sorted(slots) == sorted(ours.keys() & theirs.keys())
            ap = {key: record["metrics"]["AP"] for key, record in records.runs.items()}
            each = over_units({s: ap[ours[s]] - ap[theirs[s]] for s in slots}, unit)
            difference = contrast["differences"]["AP"]
            assert difference["n"] == len(each)
            assert difference["mean"] == pytest.approx(each.mean(), abs=1e-3)
            if len(each) > 1:
                low, high = stats.ttest_1samp(each, 0).confidence_interval(0.95)
                assert difference["low"] == pytest.approx(low, abs=1e-3)
                assert difference["high"] == pytest.approx(high, abs=1e-3)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_record_is_of_a_training_that_the_study_asks_for(path: Path) -> None:
    # Others are left out of the page, and nothing says so.
    study, records = read_study(STUDIES / f"{path.stem}.yaml"), Records(path)
    asked = [*study.models.values()]
    for name in study.content["stages"]:
        for by_slot in study.stage(name, records.tuned).values():
            asked += by_slot.values()
    for key in records.runs:
        if key.startswith("tuning/"):
            arm, weight = key.split("/")[1:3]
            asked += study.trials(arm, float(weight))
    assert sorted(records.runs) == sorted({run.key for run in asked if records.of(run)})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_records_are_small_and_name_no_machine_path(path: Path) -> None:
    text = path.read_text()
    assert len(text) < 1_000_000
    assert not any(part in text for part in ("/home/", "/tmp/", "/work/"))


# A difference with its interval, such as "8.2 AP over the plain student [+7.4, +8.9]".
BRACKETS = r"\[([+-]\d+\.\d),\s([+-]\d+\.\d)\]"
INTERVAL = re.compile(r"(-?\d+\.\d)(?:(?!\d\.\d)[^\[\]]){0,40}?" + BRACKETS)
PAGES = ("README.md", "studies/digits/findings.md")


def test_intervals_in_the_text_are_those_of_the_statistics() -> None:
    known = set()
    for path in FILES:
        for stage in Records(path).statistics.values():
            for contrast in stage["contrasts"]:
                found = contrast["differences"]["AP"]
                if found["n"] > 1:
                    mean = f"{found['mean']:.1f}".replace("-0.0", "0.0")
                    known.add((mean, f"{found['low']:+.1f}", f"{found['high']:+.1f}"))
    written = 0
    for page in PAGES:
        text = (STUDIES.parent / page).read_text(encoding="utf-8")
        assert len(INTERVAL.findall(text)) == len(re.findall(BRACKETS, text)), page
        for found in INTERVAL.findall(text):
            assert found in known, f"{page}: {found} is not a difference of studies/results"
            written += 1
    assert written >= 8


def test_the_table_of_gradients_is_that_of_the_file() -> None:
    table: dict[str, list[list[float]]] = {}
    for run, found in json.loads((STUDIES / "digits" / "gradients.json").read_text()).items():
        loss = "l2" if "/l2/" in run else "SSIM"
        ours = found["weight"] * found["distillation"]
        cells = [found["detection"], ours, ours / found["detection"]]
        table.setdefault(f"| {loss} | {found['weight']:g} |", []).append(cells)
    text = (STUDIES / "digits" / "findings.md").read_text(encoding="utf-8")
    assert len(table) == 4
    for start, runs in table.items():
        cells = [
            ", ".join(f"{value:.2g}" for value in column) for column in zip(*runs, strict=True)
        ]
        assert f"{start} {' | '.join(cells)} |" in text
