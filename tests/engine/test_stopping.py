"""SIGTERM and the lock of a folder, within this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from ssim_kd.engine.stopping import EXIT_STOPPED, StopOnSignal, Stopped, sole_owner
from tests.engine.runs import World


class Trainer:
    """As much of a trainer as the hook needs."""

    def __init__(self, *, iteration: int = 3, max_iter: int = 10) -> None:
        self.iter, self.max_iter = iteration, max_iter
        self.student = nn.Identity()
        self.stop_requested = False
        self.saved: list[str] = []
        self.checkpointer = SimpleNamespace(save=lambda name, **_: self.saved.append(name))

    def request_stop(self) -> None:
        self.stop_requested = True

    @property
    def should_stop(self) -> bool:
        return self.stop_requested


@pytest.fixture
def hook() -> Any:
    hook = StopOnSignal(grace_period=60)
    before = signal.getsignal(signal.SIGTERM)
    yield hook
    hook.after_train()
    assert signal.getsignal(signal.SIGTERM) is before
    assert hook._timer is None or hook._timer.finished.is_set()


def start(hook: StopOnSignal, **options: int) -> Trainer:
    hook.trainer = Trainer(**options)
    hook.before_train()
    return hook.trainer


def test_sigterm_saves_after_the_step(hook) -> None:
    trainer = start(hook)
    hook.after_step()
    assert not trainer.saved
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        hook.after_step()
    assert stopped.value.code == EXIT_STOPPED == 143
    assert trainer.saved == ["model_0000003"]


def test_the_last_step_is_left_to_the_final_checkpoint(hook) -> None:
    trainer = start(hook, iteration=9)
    os.kill(os.getpid(), signal.SIGTERM)
    hook.after_step()
    assert not trainer.saved


@pytest.mark.parametrize(("iteration", "saved"), [(3, ["model_0000003"]), (10, [])])
def test_an_evaluation_is_broken_off(iteration, saved, hook) -> None:
    trainer = start(hook, iteration=iteration)
    trainer.student.eval()
    trainer.student(1)
    os.kill(os.getpid(), signal.SIGTERM)
    trainer.student.train()
    trainer.student(1)
    trainer.student.eval()
    with pytest.raises(Stopped):
        trainer.student(1)
    assert trainer.saved == saved


def test_the_grace_period_is_the_longest() -> None:
    """In a process of its own, since it is ended by force: a step that never ends."""
    program = (
        "import os, signal, time; from types import SimpleNamespace; import torch\n"
        "from ssim_kd.engine.stopping import StopOnSignal\n"
        "hook = StopOnSignal(grace_period=0.2)\n"
        "hook.trainer = SimpleNamespace(request_stop=int, student=torch.nn.Identity())\n"
        "hook.before_train()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print(time.time(), flush=True)\n"
        "time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == EXIT_STOPPED
    assert time.time() - float(done.stdout) < 20


def test_one_run_a_folder(tmp_path: Path) -> None:
    with sole_owner(str(tmp_path)):
        expected = rf"in use by another run \(process {os.getpid()} "
        with pytest.raises(RuntimeError, match=expected), sole_owner(str(tmp_path)):
            pass
        # The refused one has not taken the owner's mark away.
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    with sole_owner(str(tmp_path)):
        pass


def test_a_second_run_is_refused_before_it_writes(world: World, tmp_path: Path) -> None:
    with sole_owner(str(tmp_path)), pytest.raises(RuntimeError, match="folder of its own"):
        world.main(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
