"""A study: the YAML file that describes it, and the trainings that it asks for."""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..config_files import find_config_file
from ..yaml_files import dotted, read_with_bases
from .short_form import check, contents, expand

TEACHER = "MODEL.DISTILL.TEACHER.NAME"
# What it was called before: older studies set it, and records are made with it.
_FORMER = "MODEL.DISTILL.TEACHER.CONFIG_FILE"
WEIGHT_KEY = "MODEL.DISTILL.LOSS_WEIGHT"
TUNED, AUTO = "tuned", "auto"
ARM_KEYS = {"weight", "opts", "teacher", "config", "start", "script"}
UNITS = ("teacher", "student")

#: A student of a stage, whatever its arm: the name of its teacher ("" for none), and its seed.
Slot = tuple[str, int]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        key: names it and its folder, e.g. "main/ssim/t1/3".
        config: file of its config.
        opts: overrides of the config, by key.
        seed: of the training.
        arm: name of its arm, or "" if it makes weights for others.
        teacher: name of the model that teaches it, or "".
        start: name of the model whose weights it starts from, or "".
        script: what trains it; "" is train_net.py.
        folder: that of the study.
        fingerprint: SHA-256 of all that it asks for, down to its teacher's and its start's.
    """

    key: str
    config: Path
    opts: Mapping[str, Any]
    seed: int
    arm: str = ""
    teacher: str = ""
    start: str = ""
    script: str = ""
    folder: Path = Path()
    fingerprint: str = field(default="", compare=False)


@dataclass(frozen=True)
class Study:
    """What ``studies/*.yaml`` holds; the format is described in ``studies/README.md``."""

    path: Path
    content: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the file."""
        return self.path.stem

    @functools.cached_property
    def models(self) -> dict[str, Run]:
        """The trainings whose weights others start from or learn from, by name."""
        found: dict[str, Run] = {}
        for name, asked in self.content.get("models", {}).items():
            found[name] = self._run(
                f"models/{name}", asked, found, seed=asked["seed"], opts=asked.get("opts", {})
            )
        return found

    def to_be_tuned(self, stage: str) -> list[str]:
        """The arms of a stage whose weight is tuned."""
        arms = self.content["arms"]
        return [a for a in self.content["stages"][stage]["arms"] if arms[a].get("weight") == TUNED]

    def arms(self, stage: str, weights: Mapping[str, float]) -> list[str]:
        """The arms of a stage whose weight is known."""
        arms = self.content["arms"]
        names = self.content["stages"][stage]["arms"]
        return [name for name in names if arms[name].get("weight") != TUNED or name in weights]

    def slots(self, stage: str) -> list[Slot]:
        """The students of each arm of a stage, teacher by teacher."""
        students = self.content["stages"][stage]["design"]["students"]
        return [(teacher, seed) for teacher, seeds in students.items() for seed in seeds]

    def stage(self, name: str, weights: Mapping[str, float]) -> dict[str, dict[Slot, Run]]:
        """The trainings of a stage, by arm and slot: each arm whose weight is known.

        Slots and stages share a training if they ask for the same: its key holds the arm, and
        "variant" if the stage has that (it must, if it changes "opts"). An arm without a teacher
        has one training for all slots of a seed.

        Args:
            name: of the stage.
            weights: tuned weight of each arm that has one.
        """
        stage = self.content["stages"][name]
        prefix = stage.get("variant", "students")
        return {
            arm: {
                (teacher, seed): self.student(f"{prefix}/{arm}", arm, seed, teacher, weights, stage)
                for teacher, seed in self.slots(name)
            }
            for arm in self.arms(name, weights)
        }

    def trials(self, arm: str, weight: float) -> list[Run]:
        """The trainings that tell what a weight is worth, on the tuning split."""
        tuning = self.content["tuning"]
        return [
            self.student(
                f"tuning/{arm}/{weight:g}", arm, seed, tuning["teacher"], {arm: weight}, tuning
            )
            for seed in tuning["seeds"]
        ]

    def student(
        self,
        prefix: str,
        arm: str,
        seed: int,
        teacher: str,
        weights: Mapping[str, float],
        stage: Mapping[str, Any],
    ) -> Run:
        """The training of one arm with one seed."""
        asked = {**self.content["students"], **self.content["arms"][arm]}
        opts = {**self.content["students"].get("opts", {}), **stage.get("opts", {})}
        opts |= self.content["arms"][arm].get("opts", {})
        weight = asked.get("weight")
        if weight is None:
            teacher = ""
        else:
            weight = weights[arm] if weight == TUNED else weight
            opts[WEIGHT_KEY] = AUTO if weight == AUTO else float(weight)
        if teacher:
            teacher = asked.get("teacher", teacher)
        key = "/".join([prefix, *([teacher] if teacher else []), str(seed)])
        asked["teacher"] = teacher
        return self._run(key, asked, self.models, seed=seed, opts=opts, arm=arm)

    def _run(
        self,
        key: str,
        asked: Mapping[str, Any],
        models: Mapping[str, Run],
        *,
        seed: int,
        opts: Mapping[str, Any],
        arm: str = "",
    ) -> Run:
        config = self.path.parent / asked["config"]
        if not config.is_file():
            config = Path(find_config_file(str(asked["config"])))
        script = str(self.path.parent / asked["script"]) if "script" in asked else ""
        opts = _renamed({**self.content.get("opts", {}), **opts}, _FORMER, TEACHER)
        needs = {need: asked.get(need, "") for need in ("teacher", "start")}
        for need, name in needs.items():
            if name and name not in models:
                raise ValueError(
                    f"{self.path}: {need} of {key} is {name!r}: expected one of {sorted(models)}."
                )
        whole = {
            "config": _renamed({**flattened(config), **opts}, TEACHER, _FORMER),
            "seed": seed,
            "script": Path(script).read_text() if script else "",
            **{need: models[name].fingerprint for need, name in needs.items() if name},
        }
        if self.content.get("short"):
            names = {key: str(opts[key]) for key in (TEACHER, "DATASETS.DATA_FILE") if key in opts}
            whole["files"] = contents(self.path.parent, names)
        text = json.dumps(whole, sort_keys=True)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        return Run(
            *(key, config, opts, seed, arm, needs["teacher"], needs["start"]),
            script=script,
            folder=self.path.parent,
            fingerprint=fingerprint,
        )


def read_study(path: Path) -> Study:
    """Read a study.

    Raises:
        ValueError: something is missing or unknown, or a stage names an arm that is not there.
    """
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict) or not isinstance(content.get("arms"), dict):
        raise ValueError(f"{path}: arms is missing: expected a mapping.")
    content = expand(content, path)
    for name in ("students", "stages"):
        if not isinstance(content.get(name), dict):
            raise ValueError(f"{path}: {name} is missing: expected a mapping.")
    for name, arm in content["arms"].items():
        check(f"{path}: arms.{name}", arm, ARM_KEYS)
        _check_weight(f"{path}: arms.{name}.weight", arm.get("weight"))
        if arm.get("weight") == TUNED and "tuning" not in content:
            raise ValueError(f"{path}: arms.{name} has the weight {TUNED}, without tuning.")
    for place, arms in _named_arms(content):
        unknown = sorted(set(arms) - set(content["arms"]))
        if unknown:
            raise ValueError(
                f"{path}: {place} names {unknown}: expected arms of {sorted(content['arms'])}."
            )
    for name, stage in content["stages"].items():
        _check_design(f"{path}: stages.{name}.design", stage.get("design"), content)
    study = Study(path.resolve(), content)
    # Refuses a start or a teacher that is not there.
    _ = study.models
    return study


def _check_weight(place: str, weight: Any) -> None:
    try:
        _ = weight in (None, TUNED, AUTO) or float(weight)
    except (TypeError, ValueError):
        raise ValueError(
            f"{place} is {weight!r}: expected a number, {TUNED!r} or {AUTO!r}."
        ) from None


def _check_design(place: str, design: Any, content: Mapping[str, Any]) -> None:
    students = design.get("students") if isinstance(design, dict) else None
    fits = isinstance(students, dict) and all(isinstance(s, list) for s in students.values())
    if not fits or design.keys() != {"unit", "students"}:
        raise ValueError(
            f"{place} is {design!r}: expected {{unit: teacher, students: {{t1: [1], t2: [2]}}}} "
            "or the like, see studies/README.md."
        )
    if design["unit"] not in UNITS:
        raise ValueError(f"{place}.unit is {design['unit']!r}: expected one of {UNITS}.")
    models = sorted(content.get("models", {}))
    unknown = sorted(set(design["students"]) - {"", *models})
    if unknown:
        raise ValueError(
            f'{place}.students names {unknown}: expected models of {models}, or "" for no teacher.'
        )


def _named_arms(content: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    for name, stage in content["stages"].items():
        yield f"stages.{name}.arms", stage["arms"]
        for key in ("contrasts", "primary", "identical"):
            yield f"stages.{name}.{key}", [arm for pair in stage.get(key, []) for arm in pair]
        yield f"stages.{name}.gates", [stage["gates"]] if "gates" in stage else []


@functools.cache
def flattened(config: Path) -> dict[str, Any]:
    """What a config file and its bases set, by dotted key; what they leave out is a default."""
    return dict(dotted(read_with_bases(str(config))[0]))


def _renamed(values: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if key == old else key: value for key, value in values.items()}
