"""Reads what a training left in its folder: config.yaml, metrics.json, run.json."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..metrics_file import METRICS_FILE, Series, read_metrics
from ..run_file import RUN_FILE, read_run_file
from ..sharing import without_queries
from ..yaml_files import dotted, refuse_aliases_of_aliases

#: Where Detectron2's COCOEvaluator leaves the detections, below the folder of a run.
PREDICTIONS = "inference/coco_instances_results.json"
# Tasks of Detectron2's evaluators: what stands before the name of a metric.
_TASKS = r"(?:bbox|segm|keypoints|box_proposals|sem_seg|panoptic_seg)(?:_TTA)?"
_METRIC = re.compile(rf"(?:(?P<set>.+)/)?(?P<task>{_TASKS})/(?P<metric>.+)", re.S)


class NotAvailableError(Exception):
    """Something is unknown; the message holds why, for the page."""


@dataclass
class Run:
    """A training, as far as its folder shows it.

    Attributes:
        folder: of the training, its OUTPUT_DIR.
        config: values by dotted key; {} if config.yaml is missing or not readable.
        config_text: the file.
        series: of metrics.json, by name.
        environment, command, commit, teacher: of run.json; empty without one.
        test_files: json file and image folder of the sets in COCO format, of run.json.
        memory: peak of the GPU memory in MiB, None if run.json has none.
        problems: sentences on what is missing or damaged.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    series: dict[str, Series] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    command: str = ""
    commit: str = ""
    memory: int | None = None
    teacher: dict[str, str] = field(default_factory=dict)
    test_files: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def get(self, key: str, lazy_key: str = "", default: Any = None) -> Any:
        """A value of the config, by its key in a YAML config or in a LazyConfig."""
        return self.config.get(key, self.config.get(lazy_key, default))

    @property
    def is_lazy(self) -> bool:
        """Whether the config is a LazyConfig."""
        return bool(self.config) and not any(key.startswith("MODEL.") for key in self.config)

    @property
    def teacher_name(self) -> str:
        """The teacher as the config has it; older ones call the key CONFIG_FILE."""
        former = self.get("MODEL.DISTILL.TEACHER.CONFIG_FILE", default="")
        return str(self.get("MODEL.DISTILL.TEACHER.NAME", "model.teacher.name", "") or former)

    @property
    def distils(self) -> bool:
        """Whether the training had a teacher."""
        if self.is_lazy:
            return any(key.startswith("model.teacher") for key in self.config)
        return (
            self.get("MODEL.META_ARCHITECTURE") == "DistilledDetector"
            and bool(self.get("MODEL.DISTILL.ENABLED", default=True))
            and bool(self.teacher_name)
        )

    @property
    def test_sets(self) -> list[str]:
        """The names of the data sets that it was tested on."""
        found = self.get("DATASETS.TEST", "dataloader.test.dataset.names", ())
        return [found] if isinstance(found, str) else [str(name) for name in found or ()]

    def evaluations(self) -> dict[tuple[str, str], dict[str, Series]]:
        """The metrics of the evaluations, by (data set, task) and name.

        Detectron2 leaves the name of the set out if there is only one.
        """
        only = self.test_sets[0] if len(self.test_sets) == 1 else ""
        found: dict[tuple[str, str], dict[str, Series]] = {}
        for key, series in self.series.items():
            match = _METRIC.fullmatch(key)
            if match:
                place = (match["set"] or only, match["task"])
                found.setdefault(place, {})[match["metric"]] = series
        return found

    def boxes(self, place: int = -1) -> dict[str, Series]:
        """The metrics of the boxes ("AP", "AP50", "AP-person", ...) on the last set.

        ``place`` 0: on the first, by which the best checkpoint was chosen.
        """
        return self.evaluations().get((self.test_sets[place] if self.test_sets else "", "bbox"), {})


def read_run(folder: Path) -> Run:
    """Read a training's folder. What is missing in it is noted in ``problems``.

    Raises:
        ValueError: the folder is none of a training.
    """
    if not any((folder / name).is_file() for name in (METRICS_FILE, "config.yaml")):
        state = (
            "holds neither metrics.json nor config.yaml" if folder.is_dir() else "is not a folder"
        )
        raise ValueError(
            f"RUN is {str(folder)!r}, which {state}; expected the folder of a training, its "
            "OUTPUT_DIR. Name the folder that holds metrics.json."
        )
    run = read_config(folder)
    _read_metrics(run)
    _read_facts(run)
    return run


def read_yaml(text: str) -> Any:
    """Parse YAML without running code: a value with a tag is kept as what it is made of."""
    loader = _PlainLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        refuse_aliases_of_aliases(root, "it")
        return loader.construct_document(root)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    finally:
        loader.dispose()


class _PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads config.yaml of a LazyConfig as well, which may have tags of Python's objects."""


def _plain(loader: Any, _suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)


for _prefix in ("tag:yaml.org,2002:python/", "!"):
    _PlainLoader.add_multi_constructor(_prefix, _plain)


def flatten(node: Mapping[str, Any]) -> dict[str, Any]:
    """The values of nested dicts by dotted key; tuples become lists, at any depth."""
    return {key: _listed(value) for key, value in dotted(node)}


def _listed(value: Any) -> Any:
    return [_listed(part) for part in value] if isinstance(value, list | tuple) else value


def read_config(folder: Path) -> Run:
    """A run of which only the config is read."""
    run = Run(folder)
    path = folder / "config.yaml"
    try:
        run.config_text = without_queries(path.read_text(encoding="utf-8", errors="replace"))
        found = read_yaml(run.config_text)
        if not isinstance(found, dict):
            raise ValueError("it holds no keys")
        run.config = flatten(found)
    except FileNotFoundError:
        run.problems.append(f"Config: not available: no config.yaml in {run.folder}.")
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        run.problems.append(f"Config: not available: {path} is not readable: {reason}.")
    return run


def _read_metrics(run: Run) -> None:
    try:
        found = read_metrics(run.folder)
    except OSError:
        run.problems.append(f"Curves and AP: not available: no metrics.json in {run.folder}.")
        return
    if found.damaged:
        run.problems.append(
            f"{run.folder / METRICS_FILE}: {found.damaged} of {found.lines} lines are damaged and "
            "left out."
        )
    run.series = found.series


def _read_facts(run: Run) -> None:
    try:
        facts = read_run_file(run.folder)
    except ValueError as error:
        run.problems.append(f"Environment: not available: {error}.")
        return
    if not facts:
        run.problems.append(f"Environment: not available: no {RUN_FILE} in {run.folder}.")
    run.environment = dict(facts.get("environment") or {})
    run.command, run.commit = str(facts.get("command", "")), str(facts.get("commit", ""))
    run.memory = facts.get("peak_memory_mb")
    run.teacher = dict(facts.get("teacher") or {})
    run.test_files = dict(facts.get("test_sets") or {})
