"""The pages of the documentation, their code blocks, and a user who follows them."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tests.engine.runs import ROOT, World

PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("projects/**/*.md")]
    + [*ROOT.glob("studies/*.md")]
)


def name(page: Path) -> str:
    """The path of a page in the repository."""
    return str(page.relative_to(ROOT))


def fences(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in their order."""
    pattern = rf"^( *)```{language}\n(.*?)^ *```$"
    found = re.findall(pattern, page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [textwrap.dedent(text) for _, text in found]


#: Words that a command begins with; spans of code in a sentence that do are commands as well.
PROGRAMS = ("./", "python ", "pip ", "make ", "tools/", "ssim-kd ", "torchrun ", "bash ", "OMP_")


def commands(page: Path, *, prose: bool = False) -> Iterator[str]:
    """Each command of a page in one line, without comments; with prose also those in sentences."""
    for block in fences(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield shlex.join(words)
    if prose:
        text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
            command = " ".join(span.split())
            if command.startswith(PROGRAMS) and " " in command:
                yield shlex.join(shlex.split(command, comments=True))


def make_data(folder: Path) -> None:
    """Squares of three classes on noise, in the folders that docs/own_data.md shows."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3), ("test", 2)):
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            pixels = generator.integers(0, 100, (96, 96, 3), dtype=np.uint8)
            x, y = (int(v) for v in generator.integers(0, 48, 2))
            pixels[y : y + 40, x : x + 40, i % 3] = 255
            file = f"{i:04d}.png"
            Image.fromarray(pixels).save(folder / split / file)
            images.append({"id": i, "file_name": file, "height": 96, "width": 96})
            annotation = {"id": i + 1, "image_id": i, "category_id": i % 3 + 1, "iscrowd": 0}
            annotations.append({**annotation, "bbox": [x, y, 40, 40], "area": 1600})
        categories = [{"id": k + 1, "name": f"part{k}"} for k in range(3)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))


def user_config(source: Path) -> str:
    """A config of :class:`World` as a user has it: a stock detector, without data and teacher."""
    lines = [
        line
        for line in source.read_text().splitlines()
        if not re.match(r"\s*(DISTILL:|TEACHER:|TRAIN:|TEST:)", line)
    ]
    text = "\n".join(lines).replace("NUM_CLASSES: 10, ", "")
    return text.replace("MODEL:\n", "MODEL:\n  META_ARCHITECTURE: GeneralizedRCNN\n", 1)


def user_folder(folder: Path) -> World:
    """Fill a folder with what the pages take as given: small configs and data set.

    ``data.yaml`` and ``parts/data.yaml`` are those of docs/own_data.md.
    """
    make_data(folder)
    make_data(folder / "parts")
    (text,) = (x for x in fences(ROOT / "docs/own_data.md", "yaml") if "train: {json:" in x)
    for file in ("data.yaml", "parts/data.yaml"):
        (folder / file).write_text(text)
    world = World(folder)
    student, teacher = user_config(world.config), user_config(world.teacher_config)
    for file, text in (("student", student), ("my_detector", student), ("teacher", teacher)):
        (folder / f"{file}.yaml").write_text(text)
    return world
