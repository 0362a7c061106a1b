"""The studies' own scripts: a teacher that is shown another image, a ViT that is taught first."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ssim_kd.engine import argument_parser, load_config
from ssim_kd.modeling import LevelMaps
from ssim_kd.projects import add_project_configs

STUDIES = Path(__file__).resolve().parents[2] / "studies" / "digits"


def script(name: str) -> Any:
    spec: Any = importlib.util.spec_from_file_location(name, STUDIES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_shuffled_teacher_is_one_image_off() -> None:
    module = script("shuffled_teacher")
    distiller = module.ShuffledTeacherDistiller(levels=["p2"])
    student = torch.rand(3, 2, 12, 12, generator=torch.Generator().manual_seed(0))

    def loss(teacher: torch.Tensor) -> float:
        mask = torch.ones(3, 12, 12, dtype=torch.bool)
        maps = [LevelMaps("p2", student, teacher, mask)]
        distiller.level_weights = [1.0]
        return float(distiller.pyramid_loss(maps, None)[0])

    assert loss(student.roll(-1, dims=0)) == pytest.approx(0, abs=1e-6)
    assert loss(student) > 0.2


def test_a_patch_has_the_class_of_the_smallest_box_over_its_centre() -> None:
    pytest.importorskip("timm", reason="the extra timm is not installed")
    module = script("vit_student")
    boxes = [
        {"bbox": [8, 8, 8, 8], "category_id": 3},
        {"bbox": [0, 0, 20, 31], "category_id": 7},
    ]
    # Centres at 4, 12, 20 and 28: a box ends before its far edge.
    expected = [[7, 7, 10, 10], [7, 3, 10, 10], [7, 7, 10, 10], [7, 7, 10, 10]]
    assert module.patch_labels(boxes, 4, 8, 10).tolist() == expected


def test_the_vit_learns_and_teaches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm", reason="the extra timm is not installed")
    module = script("vit_student")
    monkeypatch.chdir(tmp_path)
    options = '["img_size", 64, "patch_size", 8, "embed_dim", 16, "depth", 1, "num_heads", 2]'
    data = "DATASETS.DIGITS"
    opts = ["MODEL.DISTILL.NAME", "VFMDistiller", "MODEL.DISTILL.IN_FEATURES", '["p3"]']
    opts += ["MODEL.DISTILL.VFM.NAME", "vit_tiny_patch16_224", "MODEL.DISTILL.VFM.OPTS", options]
    opts += [f"{data}.IMAGE_SIZE", "64", f"{data}.NUM_IMAGES", "(24, 4, 4)", "SEED", "1"]
    opts += [f"{data}.DIGITS_PER_IMAGE", "(1, 2)", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", "2"]
    opts += ["SOLVER.IMS_PER_BATCH", "1", "MODEL.DEVICE", "cpu", "OUTPUT_DIR", "out"]
    opts += ["MODEL.DISTILL.TEACHER.NAME", str(STUDIES / "teacher.yaml")]
    torch.save({"model": {}}, "unused.pth")
    opts += ["MODEL.DISTILL.TEACHER.WEIGHTS", "unused.pth"]
    args = ["--config-file", str(STUDIES / "student.yaml"), *opts]

    monkeypatch.setattr("sys.argv", ["vit_student.py", *args])
    cfg = load_config(argument_parser().parse_args(args), add_project_configs)
    (_, first), (_, last) = (module.train_vit(cfg, iterations) for iterations in (1, 40))
    assert last < first / 2

    monkeypatch.setattr(module.train_vit, "__defaults__", (1,))
    module.main()
    rows = [json.loads(row) for row in Path("out/metrics.json").read_text().splitlines()]
    assert 0 < rows[-1]["distill/vfm_p3"] < 2
    assert "WEIGHTS: out/vit.pth" in Path("out/config.yaml").read_text()
