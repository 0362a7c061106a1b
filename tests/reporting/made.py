"""Runs that nothing trained: folders with what a training leaves, small and known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from ssim_kd.reporting.detections import TestSet, read_truth

CLASSES = ("a", "b")
FACTS = {
    "ssim_kd": "0.2.0",
    "commit": "1234567890+",
    "command": "ssim-kd train --config-file x.yaml",
    "config": "YAML",
    "environment": {"sys.platform": "linux", "detectron2": "0.6", "GPU 0": "NVIDIA H100"},
    "peak_memory_mb": 1200,
}


def box(image: int, category: int, x: float, y: float, w: float, h: float, **more: Any) -> dict:
    """An annotation, or with a score a detection."""
    return {"image_id": image, "category_id": category, "bbox": [x, y, w, h], **more}


# What each detection of the image is, see test_errors.py.
TRUTH = [
    box(1, 1, 0, 0, 10, 10),
    box(1, 2, 50, 50, 10, 10),
    box(1, 1, 20, 0, 10, 10),
    box(3, 2, 0, 0, 10, 10),
    box(3, 1, 50, 50, 40, 40, iscrowd=1),
    box(1, 2, 80, 80, 10, 10),
]
FOUND = [
    box(1, 1, 0, 0, 10, 10, score=0.9),
    box(1, 1, 0, 0, 10, 9, score=0.8),
    box(1, 1, 50, 50, 10, 10, score=0.7),
    box(1, 1, 26, 0, 10, 10, score=0.6),
    box(1, 2, 25, 0, 10, 10, score=0.5),
    box(2, 2, 0, 0, 10, 10, score=0.4),
    box(3, 1, 55, 55, 10, 10, score=0.3),
    box(2, 1, 0, 0, 10, 10, score=0.95),
    box(1, 2, 80, 80, 10, 10, score=0.9),
]


def write_set(folder: Path, truth: list[dict] = TRUTH, *, names: tuple = CLASSES) -> list[str]:
    """Write images and annotations; returns the entry of DATASETS.REGISTER_COCO."""
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for number in sorted({a["image_id"] for a in truth} | {1, 2, 3}):
        pixels = np.full((100, 100, 3), 40 * (number % 6), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 100, "width": 100})
    # Ids from 0, and no "iscrowd" if there is none, as own tools write.
    content = {
        "images": images,
        "annotations": [{"id": i, **a} for i, a in enumerate(truth)],
        "categories": [{"id": i, "name": n} for i, n in enumerate(names, start=1)],
    }
    (folder / "truth.json").write_text(json.dumps(content))
    return ["made_val", str(folder / "truth.json"), str(folder)]


def read_set(entry: list[str]) -> Any:
    return read_truth(TestSet(*entry))


def config(entry: list[str], *, teacher: str = "", **keys: Any) -> dict[str, Any]:
    """A config.yaml, as nested dicts; keys are dotted with "__"."""
    found: dict[str, Any] = {
        "DATASETS": {"TEST": [entry[0]], "REGISTER_COCO": [entry]},
        "MODEL": {
            "DEVICE": "cuda",
            "META_ARCHITECTURE": "DistilledDetector" if teacher else "RetinaNet",
            "WEIGHTS": "",
            "DISTILL": {
                "ENABLED": True,
                "STUDENT_META_ARCHITECTURE": "RetinaNet",
                "NAME": "SSIMDistiller",
                "TEACHER": {"CONFIG_FILE": teacher, "WEIGHTS": ""},
            },
        },
        "SOLVER": {"MAX_ITER": 60, "IMS_PER_BATCH": 8, "BASE_LR": 0.02},
        "SEED": 1,
    }
    for key, value in keys.items():
        *parents, leaf = key.split("__")
        node = found
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return found


def rows(*, ap: float = 29.5, distils: bool = False, names: tuple = CLASSES) -> list[dict]:
    """metrics.json of 60 iterations with two evaluations."""
    found: list[dict[str, Any]] = []
    for iteration in (19, 39, 59):
        row = {"iteration": iteration, "total_loss": 3.0 - iteration / 60, "loss_cls": 1.0}
        row |= {"time": 0.2, "data_time": 0.05, "lr": 0.02, "grad_norm": 1.0}
        if distils:
            row |= {"loss_distill": 0.8, "distill/ssim_p3": 0.2, "distill/ssim_p3_weighted": 0.8}
            row |= {"teacher_rank/p2": 14.84, "teacher_rank/p3": 6.02}
        found.append(row)
    for iteration, value in ((29, ap - 5), (60, ap)):
        row = {"iteration": iteration, "bbox/AP": value, "bbox/AP50": 29.455, "bbox/AP75": value}
        row |= {"bbox/APs": value, "bbox/APm": float("nan"), "bbox/APl": float("nan")}
        row |= {f"bbox/AP-{name}": value + i for i, name in enumerate(names)}
        found.append(row)
    return sorted(found, key=lambda row: row["iteration"])


def write_run(
    folder: Path,
    cfg: dict[str, Any] | str | None,
    metrics: list[dict] | None,
    *,
    found: list[dict] | None = FOUND,
    facts: dict[str, Any] | None = FACTS,
) -> Path:
    """Write a run's folder; None leaves a part out."""
    (folder / "inference").mkdir(parents=True)
    if cfg is not None:
        text = cfg if isinstance(cfg, str) else yaml.safe_dump(cfg)
        (folder / "config.yaml").write_text(text)
    if metrics is not None:
        lines = "".join(json.dumps(row) + "\n" for row in metrics)
        (folder / "metrics.json").write_text(lines)
    if found is not None:
        path = folder / "inference" / "coco_instances_results.json"
        path.write_text(json.dumps(found))
    if facts is not None:
        (folder / "run.json").write_text(json.dumps(facts))
    return folder


def write_pair(folder: Path) -> tuple[Path, Path, Path]:
    """A distilled run, next to it its control, and its teacher; returns their folders."""
    entry = write_set(folder / "data")
    teacher = write_run(folder / "teacher", config(entry), rows(ap=60.0))
    (teacher / "model_final.pth").touch()
    control = write_run(folder / "plain", config(entry), rows(ap=20.0))
    cfg = config(entry, teacher=str(teacher))
    run = write_run(folder / "ssim", cfg, rows(ap=30.0, distils=True))
    # The teacher is another training than the control.
    (teacher / "config.yaml").write_text(yaml.safe_dump(config(entry, SOLVER__MAX_ITER=90)))
    return run, control, teacher
