"""One step: what is not finite is named, written down, and stops the run or is skipped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from ssim_kd.engine.settings import Settings
from ssim_kd.engine.train_loop import DistillStep, NonFiniteError

NAN = float("nan")


class Toy(nn.Module):
    """Losses of a batch norm and a layer; batches say which value goes wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.layer = nn.Linear(3, 1)
        self.health: dict[str, torch.Tensor] = {}
        self.metrics: dict[str, torch.Tensor] = {}
        self.dtypes: list[torch.dtype] = []

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        wrong = batch[0].get("wrong", "")
        out = self.layer(self.norm(torch.stack([x["image"] for x in batch])))
        self.dtypes.append(out.dtype)
        self.health = {
            f"{who} features p3": torch.tensor(NAN if wrong == who else 1.0)
            for who in ("teacher", "student")
        }
        self.metrics = {"distill/ssim_p3": torch.tensor(NAN if wrong == "level" else 0.25)}
        if wrong == "proposals":
            self.health["student features p3"] = torch.tensor(math.inf)
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")
        loss = out.float().square().mean()
        if wrong == "gradient":
            # Finite in value, not in gradient.
            loss = loss + (self.layer.weight.sum() * 0).sqrt()
        distill = loss * (NAN if wrong == "loss" else 1.0)
        return {"loss_cls": loss, "loss_distill": distill}


def make(folder: Path, *wrong: str, **options: Any) -> DistillStep:
    torch.manual_seed(0)
    model = Toy()
    batches = [
        [{"image": torch.randn(3), "image_id": f"{i}-{j}", "wrong": w} for j in range(4)]
        for i, w in enumerate(wrong)
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return DistillStep(model, batches, optimizer, Settings(str(folder), 100, **options))


def run(step: DistillStep, steps: int) -> EventStorage:
    with EventStorage(0) as storage:
        for _ in range(steps):
            storage.iter = step.iter
            step.run_step()
            step.iter += 1
    return storage


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("teacher", "teacher features p3"),
        ("student", "student features p3"),
        ("loss", "loss_distill, grad_norm"),
        ("level", "distill/ssim_p3"),
        ("gradient", "grad_norm"),
        ("proposals", "student features p3"),
    ],
)
def test_run_step_not_finite(wrong, named, tmp_path) -> None:
    step = make(tmp_path, "", wrong)
    run(step, 1)
    before = {name: value.clone() for name, value in step.model.named_parameters()}
    with pytest.raises(NonFiniteError, match=f"Not finite at iteration 1: {named}"):
        run(step, 1)
    assert all(torch.equal(value, before[name]) for name, value in step.model.named_parameters())
    report = json.loads((tmp_path / "not_finite_0000001_rank0.json").read_text())
    assert report["image_ids"] == ["1-0", "1-1", "1-2", "1-3"]
    assert report["not_finite"] == named.split(", ")
    assert report["learning_rates"] == [0.1]
    if wrong in ("loss", "gradient"):
        assert "layer.weight" in report["parameters_with_such_gradients"]


@pytest.mark.parametrize("wrong", ["student", "loss", "level", "gradient", "proposals"])
def test_run_step_skipped(wrong, tmp_path) -> None:
    step = make(tmp_path, "", wrong, "", wrong, wrong, max_skipped_steps=2)
    run(step, 1)
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    run(step, 1)
    after = step.model.state_dict()
    # Weights, running statistics and the batch counter: as if the batch had never been.
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    run(step, 1)
    assert not torch.equal(step.model.state_dict()["layer.weight"], before["layer.weight"])
    run(step, 1)
    assert step.skipped == 2
    with pytest.raises(NonFiniteError):
        run(step, 1)
    assert len(list(tmp_path.glob("not_finite_*.json"))) == 3


def test_run_step_teacher_not_finite(tmp_path) -> None:
    step = make(tmp_path, "teacher", max_skipped_steps=10)
    with pytest.raises(NonFiniteError, match="teacher features p3"):
        run(step, 1)


def test_run_step_stop_requested(tmp_path) -> None:
    step = make(tmp_path, "", "", "loss", max_skipped_steps=1)
    run(step, 1)
    assert not step.should_stop
    step.stop_requested = True
    run(step, 1)
    assert step.should_stop
    step.should_stop = False
    run(step, 1)
    assert step.should_stop and step.skipped == 1


def test_run_step_logs_under_its_iteration(tmp_path) -> None:
    storage = run(make(tmp_path, "", ""), 2)
    for name in ("loss_cls", "loss_distill", "total_loss", "distill/ssim_p3", "grad_norm"):
        assert [iteration for _, iteration in storage.history(name).values()] == [0, 1]
    total = [storage.history(n).latest() for n in ("loss_cls", "loss_distill", "total_loss")]
    assert total[0] + total[1] == pytest.approx(total[2])
    assert not any("features" in name for name in storage.histories())


def test_run_step_bfloat16(tmp_path) -> None:
    step = make(tmp_path, "", amp=True)
    run(step, 1)
    assert step.model.dtypes == [torch.bfloat16]
    assert not step.grad_scaler.is_enabled()
    assert all(p.dtype == torch.float32 for p in step.model.parameters())


def test_run_step_eval_mode(tmp_path) -> None:
    step = make(tmp_path, "")
    step.model.eval()
    with pytest.raises(RuntimeError, match="eval mode"):
        run(step, 1)


def test_run_step_gradients_not_finite_at_any_scale(tmp_path) -> None:
    step = make(tmp_path, *[""] * 40)
    step.grad_scaler = torch.amp.GradScaler("cpu")
    step.model.layer.weight.register_hook(lambda gradient: gradient * NAN)
    with pytest.raises(NonFiniteError, match=r"gradients \(float16, down to a loss scale of 0\.00"):
        run(step, 40)
    # One step that overflows does not matter.
    step = make(tmp_path, "", "")
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    run(step, 2)


def test_run_step_report_that_cannot_be_written(tmp_path) -> None:
    """A full disk hides neither what is not finite nor the images."""
    step = make(tmp_path / "missing", "loss")
    with pytest.raises(NonFiniteError, match=r"iteration 0: loss_distill.*0-0.*No such file"):
        run(step, 1)


def test_run_step_loss_that_is_no_scalar(tmp_path) -> None:
    step = make(tmp_path, "")
    step.model.register_forward_hook(lambda *_: {"loss_x": torch.ones(2, requires_grad=True)})
    with pytest.raises(ValueError, match=r"'loss_x': \(2,\)"):
        run(step, 1)
