"""docs/own_data.md, followed literally: its commands, in its order."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.engine.runs import ROOT, World

PAGE = ROOT / "docs" / "own_data.md"


def blocks() -> list[str]:
    """The indented blocks of the page."""
    return re.findall(r"(?:^    .*\n)+", PAGE.read_text(), flags=re.M)


def make_data(folder: Path) -> None:
    """Squares of three classes on noise, in the folders that the page shows."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3), ("test", 2)):
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            pixels = generator.integers(0, 100, (96, 96, 3), dtype=np.uint8)
            x, y = (int(v) for v in generator.integers(0, 48, 2))
            pixels[y : y + 40, x : x + 40, i % 3] = 255
            name = f"{i:04d}.png"
            Image.fromarray(pixels).save(folder / split / name)
            images.append({"id": i, "file_name": name, "height": 96, "width": 96})
            annotation = {"id": i + 1, "image_id": i, "category_id": i % 3 + 1, "iscrowd": 0}
            annotations.append({**annotation, "bbox": [x, y, 40, 40], "area": 1600})
        categories = [{"id": k + 1, "name": f"part{k}"} for k in range(3)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))


def test_own_data_page_from_a_folder_of_images_to_an_exported_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_data(tmp_path / "parts")
    (description,) = (b for b in blocks() if b.lstrip().startswith("name: parts"))
    text = "\n".join(line[4:] for line in description.splitlines())
    (tmp_path / "parts" / "data.yaml").write_text(text)
    world = World(tmp_path)  # the user's two configs, small; the rest is the page's
    for name, source in (("teacher", world.teacher_config), ("student", world.config)):
        lines = [
            line
            for line in source.read_text().splitlines()
            if not re.match(r"\s*(DISTILL:|TEACHER:|TRAIN:|TEST:)", line)
        ]
        text = "\n".join(lines).replace("NUM_CLASSES: 10, ", "")
        text = text.replace("MODEL:\n", "MODEL:\n  META_ARCHITECTURE: GeneralizedRCNN\n", 1)
        (tmp_path / f"{name}.yaml").write_text(text)
    commands = [
        line.strip()
        for block in blocks()
        for line in block.splitlines()
        if line.strip().startswith(("./train_net.py", "python "))
    ]
    assert len(commands) == 6
    monkeypatch.chdir(tmp_path)
    for command in commands:
        # Each script as its own interpreter would run it, but without the seconds of its imports.
        script, *arguments = shlex.split(command.removeprefix("python "))
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    log = (tmp_path / "output/distilled/log.txt").read_text()
    # 6 images, 2 epochs, batch 4.
    assert "MAX_ITER 3" in log and "3 classes" in log
    assert "loss_distill" in (tmp_path / "output/distilled/metrics.json").read_text()
    assert "loss_distill" not in (tmp_path / "output/plain/metrics.json").read_text()
    exported = {p.name for p in (tmp_path / "output/export").iterdir()}
    assert {"student.yaml", "model.pth", "model.ts"} <= exported
