"""SIGTERM within this process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ssim_kd.engine.signals import (
    EXIT_INTERRUPTED,
    EXIT_NOT_SAVED,
    EXIT_STOPPED,
    StopOnSignal,
    Stopped,
    forward_signals,
)
from tests.engine import inside
from tests.engine.runs import children


class Trainer:
    """As much of a trainer as the hook needs."""

    def __init__(self, *, iteration: int = 3, max_iter: int = 10) -> None:
        self.iter, self.max_iter = iteration, max_iter
        self.stop_requested = False
        self.saved: list[str] = []
        self.checkpointer = SimpleNamespace(save=lambda name, **_: self.saved.append(name))

    @property
    def should_stop(self) -> bool:
        return self.stop_requested


@pytest.fixture
def hook() -> Any:
    hook = StopOnSignal(grace_period=60)
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield hook
    hook.give_back()
    assert [signal.getsignal(number) for number in numbers] == before


def start(hook: StopOnSignal, **options: int) -> Trainer:
    hook.trainer = Trainer(**options)
    hook.before_train()
    return hook.trainer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_on_signal_saves_after_the_step(number, hook) -> None:
    trainer = start(hook)
    hook.after_step()
    assert not trainer.saved
    os.kill(os.getpid(), number)
    with pytest.raises(Stopped) as stopped:
        hook.after_step()
    assert stopped.value.code == EXIT_STOPPED == 143
    assert trainer.saved == ["model_0000003"]


def test_stop_on_signal_last_step(hook) -> None:
    trainer = start(hook, iteration=9)
    os.kill(os.getpid(), signal.SIGTERM)
    hook.after_step()
    assert not trainer.saved


def test_saved_is_cut_at_once(hook) -> None:
    trainer = start(hook)
    with hook.saved():
        pass
    with pytest.raises(Stopped) as stopped, hook.saved():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        pytest.fail("went on")
    assert stopped.value.code == EXIT_STOPPED
    # A second signal does not interrupt the leaving.
    os.kill(os.getpid(), signal.SIGTERM)
    assert not trainer.saved


def test_saved_after_a_signal(hook) -> None:
    start(hook)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped), hook.saved():
        pytest.fail("went on")


def test_give_back_restores_the_handler(hook) -> None:
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    start(hook)
    hook.give_back()
    assert signal.set_wakeup_fd(before) == before
    assert "SIGTERM" not in [thread.name for thread in threading.enumerate()]


def test_start_leaves_an_ignored_interrupt(hook) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        trainer = start(hook)
        os.kill(os.getpid(), signal.SIGINT)
        assert not trainer.stop_requested
        hook.give_back()
    finally:
        signal.signal(signal.SIGINT, before)


def test_signal_watch_forked_child(hook) -> None:
    """Those of multiprocessing.Pool, which panoptic evaluation uses, are ended so."""
    trainer = start(hook)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    child.terminate()
    child.join(10)
    assert child.exitcode == -signal.SIGTERM
    assert not trainer.stop_requested
    assert hook._watch is not None and hook._watch._thread.is_alive()


# A main thread in compiled code, as where it waits for another process: it runs no handler.
BUSY = """
import ctypes, os, signal, threading, time
from types import SimpleNamespace
from ssim_kd.engine.signals import StopOnSignal
hook = StopOnSignal(grace_period=0.3, key="SOLVER.GRACE_PERIOD")
checkpointer = SimpleNamespace(last_saved=None)
hook.trainer = SimpleNamespace(stop_requested=False, iter=7, checkpointer=checkpointer)
hook.before_train()
threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()
{block}
print(time.time(), flush=True)
{wait}
"""
# Another thread then gets the signal, and the sleep is not interrupted.
BLOCK = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])"
WAITS = {
    "in compiled code": "ctypes.CDLL(None).sleep(60)",
    "in compiled code, saved": "with hook.saved():\n    ctypes.CDLL(None).sleep(60)",
    "after the step was saved": "checkpointer.last_saved = 7; ctypes.CDLL(None).sleep(60)",
}


def ended(folder: Path, wait: str, *, more: str = "") -> tuple[int, float, str]:
    program = BUSY.format(wait=wait, block=BLOCK + more)
    with children(["--eval-only"], folder=folder, prepare=partial(inside.execute, program)) as (
        one,
    ):
        code = one.wait()
    started, _, rest = one.output.partition("\n")
    return code, time.time() - float(started), rest


@pytest.mark.parametrize("wait", list(WAITS))
def test_stop_on_signal_grace_period(wait: str, tmp_path: Path) -> None:
    """In a separate process, since it is ended by force: a step that never ends."""
    code, seconds, error = ended(tmp_path, WAITS[wait])
    if "saved" in wait:
        assert code == EXIT_STOPPED
    else:
        assert code == EXIT_NOT_SAVED == 75
        assert error.endswith("Not saved within SOLVER.GRACE_PERIOD (0.3 s).\n")
    assert seconds < 20


def test_a_second_interrupt_ends_the_process_at_once(tmp_path: Path) -> None:
    twice = """
hook.grace_period = 60
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
for seconds in (0.2, 0.6):
    threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGINT]).start()
"""
    code, seconds, _ = ended(tmp_path, WAITS["in compiled code"], more=twice)
    assert code == EXIT_INTERRUPTED == 130
    assert seconds < 20


def test_forward_signals_gives_the_handlers_back() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(Stopped), forward_signals():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    assert [signal.getsignal(number) for number in numbers] == before
