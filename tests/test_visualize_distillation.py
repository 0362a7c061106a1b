"""ssim-kd visualize: sheets and page of a checkpoint."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssim_kd.command_line import visualize_parser
from ssim_kd.sheets import main
from tests.engine.runs import World


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("visualize")
    world = World(folder)
    short = ("SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()", "DATASETS.TEST", "()")
    world.main(folder / "run", *short)
    return folder / "run"


def arguments(run: Path, output: Path, weights: Path) -> argparse.Namespace:
    config = run / "config.yaml"
    test = ["DATASETS.TEST", "('digits_val',)", "MODEL.WEIGHTS", str(weights)]
    folder = ["--config-file", str(config), "--output", str(output)]
    return visualize_parser().parse_args([*folder, "--images", "2", *test])


def test_main_draws_a_sheet_an_image_and_a_page(run: Path, tmp_path: Path) -> None:
    main(arguments(run, tmp_path, run / "model_final.pth"))
    for name in ("000.png", "001.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert pixels.std() > 10, name
    page = (tmp_path / "index.html").read_text()
    assert all(name in page for name in ("000.png", "001.png", "p2", "p6", "structure", "l2"))
    rows = re.findall(r"<tr><th>(p\d)</th>\s*(.*?)</tr>", page, flags=re.S)
    assert [level for level, _ in rows] == ["p2", "p3", "p4", "p5", "p6"]
    for _, cells in rows:
        values = [float(v) for v in re.findall(r"<td>([-\d.]+)</td>", cells)]
        assert len(values) == 7 and 0 < values[2] < 1  # the loss
    assert "http" not in page.replace("<!doctype", "")


def test_load_model_of_weights_without_adapters(run: Path, tmp_path: Path) -> None:
    saved = torch.load(run / "model_final.pth", weights_only=True)
    torch.save({"model": saved["model"]}, tmp_path / "plain.pth")
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS") as caught:
        main(arguments(run, tmp_path / "out", tmp_path / "plain.pth"))
    assert "adapters" in str(caught.value)
