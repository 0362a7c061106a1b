"""A wrong teacher of every kind: refused, or told in one clear line, before the first step."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssim_kd.engine.train_loop import DistillStep
from tests.engine.runs import World, log

pytestmark = pytest.mark.faults

State = dict[str, torch.Tensor]
OPTIONS = ("SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()")


def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_step(self: DistillStep) -> None:
        raise AssertionError("a first step was made")

    monkeypatch.setattr(DistillStep, "run_step", run_step)


def shuffled(state: State) -> State:
    """Tensors of one shape have changed their names."""
    by_shape: dict[tuple, list[str]] = {}
    for name, value in state.items():
        by_shape.setdefault(tuple(value.shape), []).append(name)
    return {
        name: state[other]
        for names in by_shape.values()
        for name, other in zip(names, names[1:] + names[:1], strict=True)
    }


class Evil:
    def __init__(self, folder: Path) -> None:
        self.command = f"touch {folder}/ran"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def imagenet(state: State, path: Path) -> None:
    arrays = {k.removeprefix("backbone.bottom_up."): v.numpy() for k, v in state.items()}
    content = {"model": arrays, "matching_heuristics": True, "__author__": "torchvision"}
    path.write_bytes(pickle.dumps(content))


def saved(change: Callable[[State], Any]) -> Callable[[State, Path], None]:
    return lambda state, path: torch.save({"model": change(state)}, path)


def with_value(value: float) -> Callable[[State], State]:
    def change(state: State) -> State:
        changed = dict(state)
        name = next(k for k in state if k.endswith("fpn_output4.weight"))
        changed[name] = torch.full_like(state[name], value)
        return changed

    return change


# By the whole command; others are in tests/checkpoint.
REFUSED: dict[str, tuple[Callable[[State, Path], Any], str]] = {
    "one layer of zeros": (saved(with_value(0.0)), "fpn_output4.weight is all zeros"),
    "Inf": (saved(with_value(np.inf)), "fpn_output4.weight holds NaN or Inf"),
    "a key is missing": (
        saved(lambda s: {k: v for k, v in s.items() if "res4.2.conv1.weight" not in k}),
        "1 keys missing",
    ),
    "ImageNet backbone": (imagenet, "the file of an ImageNet backbone"),
    "a web page": (lambda s, path: path.write_text("<html>404</html>"), "is not a checkpoint"),
    "runs code": (saved(lambda s: Evil(Path.cwd())), "posix.system"),
    "a folder": (lambda s, path: path.mkdir(), "no such file"),
    "missing": (lambda s, path: None, "no such file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_main_teacher_file_refused(kind, world: World, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    no_training(monkeypatch)
    make, expected = REFUSED[kind]
    path = tmp_path / ("teacher.pkl" if kind == "ImageNet backbone" else "t.pth")
    make(torch.load(world.teacher)["model"], path)
    with pytest.raises(ValueError, match=expected) as raised:
        world.main(tmp_path / "out", *OPTIONS, "MODEL.DISTILL.TEACHER.WEIGHTS", path)
    message = str(raised.value)
    assert "MODEL.DISTILL.TEACHER.WEIGHTS is " in message and path.name in message
    assert "\n" not in message and len(message) < 1000
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("other depth", ["MODEL.RESNETS.DEPTH", 101], "keys missing"),
        ("other norm", ["MODEL.RESNETS.NORM", "GN"], "num_channels (16) must be divisible"),
        ("no norm", ["MODEL.FPN.NORM", ""], "keys"),
        ("other width", ["MODEL.RESNETS.WIDTH_PER_GROUP", 16], "of another shape"),
        ("other FPN", ["MODEL.FPN.OUT_CHANNELS", 32], "of another shape"),
        ("no FPN", ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES",
                    ["res4"], "MODEL.RPN.IN_FEATURES", ["res4"], "MODEL.ROI_HEADS.IN_FEATURES",
                    ["res4"], "MODEL.ANCHOR_GENERATOR.SIZES", [[32]]],
         "share no level of equal stride"),
        ("the student's", [], "of another shape"),
        ("another detector", ["MODEL.META_ARCHITECTURE", "RetinaNet"], "keys"),
    ],
)  # fmt: skip
def test_main_teacher_of_another_architecture(
    kind, options, expected, world: World, tmp_path, monkeypatch
) -> None:
    no_training(monkeypatch)
    overrides: list[Any] = ["MODEL.DISTILL.TEACHER.OPTS", repr(options)]
    if kind == "the student's":
        from tests.engine.runs import save_random_detector

        save_random_detector(world.config, tmp_path / "own.pth")
        overrides += ["MODEL.DISTILL.TEACHER.WEIGHTS", tmp_path / "own.pth"]
    if kind == "another detector":
        overrides = ["MODEL.DISTILL.TEACHER.NAME", world.retinanet]
    with pytest.raises(ValueError, match=r"MODEL\.DISTILL\.(TEACHER|IN_FEATURES)") as raised:
        world.main(tmp_path / "out", *OPTIONS, *overrides)
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("other classes", "The teacher's heads do not fit its config"),
        ("shuffled", "EXPECTED_AP is 0: the quality of the teacher is not checked"),
        ("the student's own file", "the same file as MODEL.WEIGHTS"),
    ],
)
def test_main_teacher_that_is_told_of(kind, expected, world: World, tmp_path, monkeypatch) -> None:
    checkpoint = torch.load(world.teacher)
    state = checkpoint["model"]
    if kind == "other classes":
        name = next(k for k in state if "cls_score.weight" in k)
        state[name] = state[name][:3]
    if kind == "shuffled":
        checkpoint["model"] = shuffled(state)
    path = tmp_path / "teacher.pth"
    torch.save(checkpoint, path)
    options: list[Any] = ["MODEL.DISTILL.TEACHER.WEIGHTS", path]
    if kind == "the student's own file":
        shutil.copy(path, tmp_path / "start.pth")
        options += ["MODEL.WEIGHTS", tmp_path / "start.pth", "MODEL.FPN.OUT_CHANNELS", 48]
    no_training(monkeypatch)
    with pytest.raises(AssertionError, match="a first step"):
        world.main(tmp_path / "out", *OPTIONS, *options)
    assert log(tmp_path / "out").count(expected) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_main_teacher_in_half_precision(dtype, world: World, tmp_path) -> None:
    state = torch.load(world.teacher)["model"]
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    torch.save({"model": half}, tmp_path / "half.pth")
    options = ("MODEL.DISTILL.TEACHER.WEIGHTS", tmp_path / "half.pth")
    world.main(tmp_path / "out", *OPTIONS, *options, "SOLVER.STEPS", "()")


@pytest.mark.parametrize("kind", ["untrained", "shuffled"])
def test_main_expected_ap_refuses(kind, world: World, tmp_path, monkeypatch) -> None:
    no_training(monkeypatch)
    path = tmp_path / "teacher.pth"
    state = torch.load(world.teacher)["model"]
    torch.save({"model": shuffled(state) if kind == "shuffled" else state}, path)
    options = ("MODEL.DISTILL.TEACHER.WEIGHTS", path, "MODEL.DISTILL.TEACHER.EXPECTED_AP", 20.0)
    with pytest.raises(ValueError, match=r"EXPECTED_AP is 20\.0"):
        world.main(tmp_path / "out", "SOLVER.MAX_ITER", 1, *options)
