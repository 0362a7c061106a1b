"""What is kept of a finished training."""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..checkpoint import read_checkpoint
from ..data.digits.dataset import DIGITS_NAMES, splits_from_config
from ..metrics_file import read_metrics
from ..run_file import read_run_file

NAMES = ("AP", "AP50", "AP75")
PACKAGES = ("torch", "torchvision", "detectron2", "numpy")


def measure(
    folder: Path, request: Mapping[str, Any], measured: Mapping[str, Any]
) -> dict[str, Any]:
    """Read metrics, curve and weights of a training's folder.

    Args:
        folder: of the training.
        request: what was asked for; "small_box" is an area in pixels, "cwd" the folder in which the
            training ran, and relative paths of its data begin.
        measured: seconds, CPU seconds and memory.

    Returns:
        "measured", a record without what was asked for, and "machine".
    """
    series = read_metrics(folder).series
    sets = _datasets(folder).TEST
    # Of several sets the last: its detections are those that the folder holds.
    box = f"{sets[-1]}/bbox" if len(sets) > 1 else "bbox"
    metrics = {name: series[f"{box}/{name}"].values[-1] for name in NAMES}
    metrics |= by_size(folder, Path(request["cwd"]), request["small_box"])
    own = {
        "test_set": sets[-1],
        "metrics": {name: round(value, 3) for name, value in metrics.items()},
        "curve": [[i, round(ap, 2)] for i, ap in series[f"{box}/AP"].pairs()],
        **measured,
        "weights_sha256": weights_hash(folder / "model_final.pth"),
        "commit": read_run_file(folder).get("commit", ""),
    }
    if request["teacher_sha256"]:
        own["teacher_sha256"] = request["teacher_sha256"]
    return {"measured": own, "machine": machine()}


def by_size(folder: Path, cwd: Path, small_box: float) -> dict[str, float]:
    """AP of small and of large boxes, 0 to 100: those with an area below ``small_box``, and others.

    COCO's own areas do not divide the small images of a study.
    """
    found = folder / "inference" / "coco_instances_results.json"
    if not json.loads(found.read_text()):
        return {"small": 0.0, "large": 0.0}
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        coco = COCO(cwd / ground_truth(folder))
        for annotation in coco.dataset["annotations"]:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        evaluation = COCOeval(coco, coco.loadRes(str(found)), "bbox")
        evaluation.params.areaRng = [[0, small_box], [small_box, 1e10]]
        evaluation.params.areaRngLbl = ["small", "large"]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]  # IoU, recall, class, area, detections
    sizes = {}
    for place, name in enumerate(evaluation.params.areaRngLbl):
        values = precision[:, :, :, place, 0]
        values = values[values > -1]  # empty: the set has no box of that size
        sizes[name] = 100 * float(np.mean(values)) if values.size else math.nan
    return sizes


def _datasets(folder: Path) -> CfgNode:
    with open(folder / "config.yaml") as file:
        return CfgNode.load_cfg(file).DATASETS


def ground_truth(folder: Path) -> str:
    """The annotations of the last data set that a training was tested on.

    Raises:
        ValueError: it is none of the digits, nor of ``DATASETS.REGISTER_COCO``.
    """
    datasets = _datasets(folder)
    name = datasets.TEST[-1]
    registered = {entry[0]: str(entry[1]) for entry in datasets.REGISTER_COCO}
    if name in registered:
        return registered[name]
    if name not in DIGITS_NAMES:
        raise ValueError(
            f"DATASETS.TEST is {datasets.TEST}: expected one of {DIGITS_NAMES}, or a set of "
            "DATASETS.REGISTER_COCO last."
        )
    splits = splits_from_config(CfgNode({"DATASETS": datasets}))
    return str(splits[DIGITS_NAMES.index(name)].json_file)


def weights_hash(path: Path) -> str:
    """SHA-256 of the student's tensors: equal if two trainings came to the same bits."""
    model = read_checkpoint(str(path))["model"]
    found = hashlib.sha256()
    for name in sorted(model):
        found.update(name.encode())
        found.update(torch.as_tensor(model[name]).contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def machine() -> dict[str, Any]:
    """Processor, GPU and versions."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        # Sums are rounded by it: trainings of two kinds of processor part.
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
