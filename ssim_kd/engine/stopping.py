"""An orderly end: SIGTERM, a parent that died, a second run in the same folder."""

import ctypes
import fcntl
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import IO, Any

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn
from torch.utils.hooks import RemovableHandle

logger = logging.getLogger(__name__)

#: Exit status of a run that SIGTERM ended after it had saved: 128 + 15, as shells have it.
EXIT_STOPPED = 128 + signal.SIGTERM


class Stopped(SystemExit):
    """The run was asked to end, and has saved."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


class StopOnSignal(HookBase):
    """On SIGTERM: finish the step, save a checkpoint, exit with :data:`EXIT_STOPPED`.

    SLURM and spot instances send it some seconds before they kill. All processes stop after the
    same step, whichever of them got the signal. An evaluation is broken off at the next image by
    each process that got it. If that takes longer than the grace period (as it does where another
    process has died), the process ends without saving.
    """

    def __init__(self, grace_period: float) -> None:
        """
        Args:
            grace_period: in seconds.
        """
        self.grace_period = grace_period
        self._previous: signal.Handlers | object | None = None
        self._timer: threading.Timer | None = None
        self._in_evaluation: RemovableHandle | None = None

    def before_train(self) -> None:
        """Take over the signal; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._request)
        self._in_evaluation = self.trainer.student.register_forward_pre_hook(self._evaluates)

    def after_step(self) -> None:
        """Save and leave if any process was asked to; the last step is saved by other hooks."""
        if self.trainer.should_stop and self.trainer.iter + 1 < self.trainer.max_iter:
            self._save()
            comm.synchronize()
            raise Stopped

    def _save(self) -> None:
        iteration = self.trainer.iter
        logger.warning("SIGTERM: saving a checkpoint at iteration %d, then stopping.", iteration)
        self.trainer.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)

    def _evaluates(self, student: nn.Module, _inputs: Any) -> None:
        """Before each image of an evaluation: leave if this process was asked to."""
        if student.training or not self.trainer.stop_requested:
            return
        # After the last iteration the final checkpoint is there.
        if self.trainer.iter < self.trainer.max_iter:
            self._save()
        raise Stopped

    def after_train(self) -> None:
        """Give the signal back."""
        if self._in_evaluation is not None:
            self._in_evaluation.remove()
        if self._timer is not None:
            self._timer.cancel()
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)  # type: ignore[arg-type]

    def _request(self, _signal: int, _frame: FrameType | None) -> None:
        self.trainer.request_stop()
        if self._timer is None:
            # os._exit: a thread that waits for a dead process cannot be interrupted otherwise.
            self._timer = threading.Timer(self.grace_period, os._exit, [EXIT_STOPPED])
            self._timer.daemon = True
            self._timer.start()


def forward_sigterm() -> None:
    """Make this process, which waits for those it spawned, pass SIGTERM on to them."""

    def forward(_signal: int, _frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            child.terminate()

    signal.signal(signal.SIGTERM, forward)


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, however that ends. Linux alone."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


@contextmanager
def sole_owner(folder: str) -> Iterator[None]:
    """Hold a folder for this run; the lock goes with the process, however that ends.

    Args:
        folder: exists. Every process of a run calls this; the main one holds the lock.

    Raises:
        RuntimeError: another run writes there; on every process.
    """
    lock: IO[str] | None = None
    error = None
    if comm.is_main_process() and "://" not in folder:
        lock = open(os.path.join(folder, ".lock"), "a+")  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
        except BlockingIOError:
            lock.seek(0)
            error = (
                f"OUTPUT_DIR {folder!r} is in use by another run ({lock.read()}). Give this one a "
                "folder of its own."
            )
            lock.close()
    error = comm.all_gather(error)[0]
    if error:
        raise RuntimeError(error)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()
