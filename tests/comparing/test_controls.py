"""The control whose teacher is shown another image."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from ssim_kd.modeling import LevelMaps

SCRIPT = Path(__file__).resolve().parents[2] / "studies" / "digits" / "shuffled_teacher.py"


def test_the_shuffled_teacher_is_one_image_off() -> None:
    spec: Any = importlib.util.spec_from_file_location("shuffled_teacher", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    distiller = module.ShuffledTeacherDistiller(levels=["p2"])
    student = torch.rand(3, 2, 12, 12, generator=torch.Generator().manual_seed(0))

    def loss(teacher: torch.Tensor) -> float:
        mask = torch.ones(3, 12, 12, dtype=torch.bool)
        maps = [LevelMaps("p2", student, teacher, mask, padded=False)]
        distiller.level_weights = [1.0]
        return float(distiller.pyramid_loss(maps, None)[0])

    assert loss(student.roll(-1, dims=0)) == pytest.approx(0, abs=1e-6)
    assert loss(student) > 0.2
