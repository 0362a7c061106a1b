"""Hooks that no other test runs through a whole training: pictures, writers, states of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.engine.defaults import default_writers
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils.events import EventStorage, EventWriter
from torch import nn

from ssim_kd import visualization
from ssim_kd.checkpoint import StudentCheckpointer
from ssim_kd.engine.hooks import BestCheckpoint, RankStates, VisualizeDistillation
from ssim_kd.engine.writers import GuardedWriter, PeriodicWriter
from tests.engine.runs import World


class Failing(EventWriter):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def write(self) -> None:
        self.calls.append("write")
        raise OSError("No space left on device")

    def close(self) -> None:
        self.calls.append("close")
        raise ConnectionError("offline")


def test_guarded_writer_fails_once(caplog) -> None:
    inner = Failing()
    writer = GuardedWriter(inner)
    for _ in range(3):
        writer.write()
    assert inner.calls == ["write"]
    assert caplog.text.count("Failing") == 1 and "OSError: No space left" in caplog.text
    writer.close()
    assert inner.calls == ["write", "close"]


def trainer(iteration: int) -> Any:
    return SimpleNamespace(iter=iteration, model=nn.Identity())


@pytest.mark.parametrize("error", [ValueError("no such mode"), FileNotFoundError("0.png")])
def test_visualize_distillation_fails_once(error, monkeypatch, caplog) -> None:
    """An unreadable picture, or one of a format that cannot be drawn."""
    drawn: list[int] = []

    def fail(*_args: Any, **_options: Any) -> None:
        drawn.append(1)
        raise error

    monkeypatch.setattr(visualization, "loss_map_images", fail)
    hook = VisualizeDistillation(2, lambda: [{}], key="VIS_PERIOD")
    for iteration in range(6):
        hook.trainer = trainer(iteration)
        hook.trainer.model.train()
        hook.after_step()
        assert hook.trainer.model.training
    assert len(drawn) == 1 and caplog.text.count("VIS_PERIOD") == 1 and str(error) in caplog.text


def test_visualize_distillation_draws(world: World, tmp_path: Path, monkeypatch) -> None:
    import numpy as np

    image = np.zeros((4, 6, 3), dtype=np.uint8)
    monkeypatch.setattr(visualization, "loss_map_images", lambda *_, **__: {"p3": image})
    hook = VisualizeDistillation(2, lambda: [{}], key="VIS_PERIOD")
    hook.trainer = trainer(1)
    with EventStorage() as storage:
        hook.after_step()
    assert [name for name, *_ in storage._vis_data] == ["distill/p3"]


def test_rank_states_of_a_step_without_checkpoint() -> None:
    student: Any = SimpleNamespace(loss_normalizer=7.5)
    due = [True, False]
    hook = RankStates(student, lambda: due.pop(0))
    hook.trainer = trainer(3)
    hook.after_step()
    assert hook.state_dict() == {"loss_normalizer": [7.5]}
    # Not that of an earlier step, if the user's code saves later.
    hook.trainer, student.loss_normalizer = trainer(4), 6.5
    hook.after_step()
    assert hook.state_dict() == {"loss_normalizer": [6.5]}
    hook.load_state_dict({"loss_normalizer": [1.5, 2.5]})
    assert student.loss_normalizer == 1.5


@pytest.mark.parametrize("start", [0, 6])
def test_periodic_writer_after_each_evaluation(start: int, tmp_path: Path) -> None:
    """Every 3 iterations; one that is made again on a resume is written as well."""

    class Evaluates(HookBase):
        def before_train(self) -> None:
            if start:
                self.trainer.iter = self.trainer.storage.iter = start - 1
                self.after_step()
                self.trainer.iter = self.trainer.storage.iter = start

        def after_step(self) -> None:
            if (self.trainer.iter + 1) % 3 == 0:
                self.trainer.storage.put_scalar("bbox/AP", self.trainer.iter, smoothing_hint=False)

    class Steps(TrainerBase):
        def run_step(self) -> None:
            self.storage.put_scalar("total_loss", self.iter)

    writers = [GuardedWriter(w) for w in default_writers(str(tmp_path), 12)]
    trainer = Steps()
    trainer.register_hooks([Evaluates(), PeriodicWriter(writers, eval_period=3)])
    trainer.train(start, 12)
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    again = [5] if start else []
    evaluated = [row["iteration"] for row in rows if "bbox/AP" in row]
    assert evaluated == [*again, *range(start + 2, 12, 3)]
    assert all(row["bbox/AP"] == row["iteration"] for row in rows)
    assert [row["iteration"] for row in rows if "total_loss" in row] == evaluated[len(again) :]
    assert not any(writer._accessory.failed for writer in writers)


@pytest.mark.parametrize(
    ("kept", "level"),
    [
        ({"iteration": 3}, "INFO"),
        ({"iteration": 2}, "WARNING"),
        (b"cut", "WARNING"),
        (None, "WARNING"),
    ],
    ids=["whole", "of another iteration", "cut", "missing"],
)
def test_best_checkpoint_is_named_if_it_can_be_read(kept, level, tmp_path, caplog) -> None:
    path, hook = tmp_path / "model_best.pth", BestCheckpoint()
    if isinstance(kept, bytes):
        path.write_bytes(kept)
    elif kept:
        torch.save(kept, path)
    checkpointer = StudentCheckpointer(nn.Identity(), str(tmp_path))
    checkpointer.get_checkpoint_file, checkpointer.keep_best = lambda: "last", lambda: None
    hook.trainer = SimpleNamespace(checkpointer=checkpointer, iter=4, max_iter=4)
    hook.offer({"bbox": {"AP": 41.5}})
    with caplog.at_level("INFO"):
        hook.after_train()
    (record,) = caplog.records
    assert record.levelname == level
    assert f"{path}, box AP 41.50 at iteration 3" in record.getMessage()


@pytest.mark.parametrize("iteration", [2, 4], ids=["in between", "after the last step"])
def test_best_checkpoint_is_that_of_its_evaluation(iteration, tmp_path, caplog) -> None:
    hook, checkpointer = BestCheckpoint(), StudentCheckpointer(nn.Identity(), str(tmp_path))
    hook.trainer = SimpleNamespace(checkpointer=checkpointer, iter=iteration, max_iter=4)
    checkpointer.save("model_x", iteration=min(iteration, 3))
    hook.offer({"bbox": {"AP": 41.5}})
    hook.after_train()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_best_checkpoint_of_no_number_is_said_to_be_none(tmp_path, caplog) -> None:
    hook = BestCheckpoint()
    checkpointer = StudentCheckpointer(nn.Identity(), str(tmp_path))
    hook.trainer = SimpleNamespace(checkpointer=checkpointer, iter=4, max_iter=4)
    hook.offer({"bbox": {"AP": float("nan")}})
    with caplog.at_level("INFO"):
        hook.after_train()
    assert "model_best.pth" in caplog.text and "model_final.pth" in caplog.text
