"""ssim-kd doctor: what it finds on this machine and of a config."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ssim_kd.__main__ import main
from tests.documentation import make_data


def test_main_of_a_machine(capsys) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in lines[0] and lines[0].startswith("[ok]")
    assert any("SSIM" in line for line in lines)


def test_main_of_a_config(tmp_path: Path, capsys) -> None:
    make_data(tmp_path)
    (tmp_path / "data.yaml").write_text(
        "train: {json: train.json, images: train}\nval: {json: val.json, images: val}\n"
    )
    config = ["--config-file", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"]
    config += ["--data", str(tmp_path / "data.yaml")]
    teacher = ["--teacher", "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"]
    out = ["OUTPUT_DIR", str(tmp_path / "run")]
    assert main(["doctor", *config, *teacher, *out]) == 0
    text = capsys.readouterr().out
    assert "6 images" in text and "faster_rcnn_R_101_FPN_3x" in text and "[fail]" not in text

    assert main(["doctor", *config, "--teacher", str(tmp_path / "nowhere"), *out]) == 1
    assert "MODEL.DISTILL.TEACHER.NAME" in capsys.readouterr().out
    content = json.loads((tmp_path / "train.json").read_text())
    content["annotations"][0]["bbox"] = [0, 0, -5, 5]
    (tmp_path / "train.json").write_text(json.dumps(content))
    assert main(["doctor", *config, *out]) == 1
    assert "train.json" in capsys.readouterr().out
