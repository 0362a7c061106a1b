"""NaN put into a real training: named with its level, written down, stopped or skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ssim_kd.engine.train_loop import DistillStep, NonFiniteError
from tests.engine import inside
from tests.engine.runs import World, checkpoint, children, metrics

pytestmark = pytest.mark.faults

NAN = float("nan")
OPTIONS = ("DATASETS.TEST", "()", "SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_PERIOD", 2)
FEATURES = [f"features p{i}" for i in range(2, 7)]
# What is put in, and the first names of the report.
FAULTS = {
    "a level of the student": ["student features p4"],
    "all of the student": [f"student {name}" for name in FEATURES],
    "a level of the teacher": ["teacher features p3"],
    "a loss": ["loss_cls"],
    "the distillation": ["loss_distill"],
    "a gradient": ["grad_norm"],
}


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list]:
    def do(fault: str, at: set[int]) -> list[tuple[int, dict[str, torch.Tensor]]]:
        states: list[tuple[int, dict[str, torch.Tensor]]] = []
        step = DistillStep.run_step

        def run_step(self: DistillStep) -> None:
            model: Any = self.model
            states.append((self.iter, {k: v.clone() for k, v in model.state_dict().items()}))
            if self.iter not in at:
                return step(self)
            handle = inside.put_in(fault, model)
            try:
                return step(self)
            finally:
                handle.remove()

        monkeypatch.setattr(DistillStep, "run_step", run_step)
        return states

    return do


@pytest.mark.parametrize("fault", FAULTS)
def test_train_not_finite_stops(fault, inject, world: World, tmp_path: Path) -> None:
    inject(fault, {3})
    with pytest.raises(NonFiniteError, match="Not finite at iteration 3: ") as raised:
        world.main(tmp_path, *OPTIONS)
    report = json.loads((tmp_path / "not_finite_0000003_rank0.json").read_text())
    assert report["not_finite"][: len(FAULTS[fault])] == FAULTS[fault], report["not_finite"]
    assert str(tmp_path / "not_finite_0000003_rank0.json") in str(raised.value)
    assert len(report["image_ids"]) == 4 and all(i.isdigit() for i in report["image_ids"])
    if fault == "a gradient":
        assert report["parameters_with_such_gradients"]
    # The last checkpoint is of before.
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    state = checkpoint(tmp_path, "model_0000001")["model"]
    assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("fault", [f for f in FAULTS if "teacher" not in f])
def test_train_not_finite_skipped(fault, inject, world: World, tmp_path: Path) -> None:
    states = inject(fault, {2, 3})
    world.main(tmp_path, *OPTIONS, "SOLVER.MAX_SKIPPED_STEPS", 2)
    by_iteration = dict(states)
    for name, value in by_iteration[4].items():
        assert torch.equal(value, by_iteration[2][name]), name
    saved = checkpoint(tmp_path)
    assert saved["trainer"]["skipped_steps"] == 2
    assert any(not torch.equal(v, by_iteration[4][k]) for k, v in saved["model"].items())
    assert all("loss_cls" not in x or x["loss_cls"] == x["loss_cls"] for x in metrics(tmp_path))

    # One more than allowed; the count goes on after a resume.
    inject(fault, {4})
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    with pytest.raises(NonFiniteError, match="iteration 4"):
        world.main(tmp_path, "--resume", *OPTIONS, "SOLVER.MAX_SKIPPED_STEPS", 2)


def test_train_teacher_not_finite(inject, world: World, tmp_path: Path) -> None:
    inject("a level of the teacher", {1})
    with pytest.raises(NonFiniteError, match="iteration 1: teacher features p3"):
        world.main(tmp_path, *OPTIONS, "SOLVER.MAX_SKIPPED_STEPS", 100)


@pytest.mark.parametrize(
    ("fault", "skips"), [("the distillation", True), ("all of the student", False)]
)
def test_train_not_finite_on_one_of_two(fault, skips, world: World, tmp_path: Path) -> None:
    """Both skip the same step; if the student itself has stopped half-way, both end."""
    line = world.arguments(tmp_path, *OPTIONS, "SOLVER.MAX_SKIPPED_STEPS", 2)
    prepare = partial(
        inside.all_of,
        [
            partial(inside.put_in_at, fault, 2, 1),
            partial(inside.record_rank, str(tmp_path)),
        ],
    )
    with children(line, line, folder=tmp_path, prepare=prepare) as ranks:
        codes = [rank.wait(60) for rank in ranks]
    if skips:
        assert codes == [0, 0], ranks[0].output[-3000:]
        first, second = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in (0, 1))
        assert first["parameters"] == second["parameters"]
        assert checkpoint(tmp_path)["trainer"]["skipped_steps"] == 1
        assert len(list(tmp_path.glob("not_finite_0000002_rank?.json"))) == 2
    else:
        assert all(codes), codes
        assert "student features p2" in ranks[1].output
