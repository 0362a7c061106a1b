"""SIGTERM: an orderly end, watched for even in compiled code; processes that end with their parent.

- :class:`StopOnSignal` is the hook that saves and leaves.
- :class:`SigtermWatch` takes the signal over.
- :func:`forward_sigterm` and :func:`die_with_parent` are for launchers and what they spawn.
"""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from detectron2.engine import HookBase
from detectron2.utils import comm

logger = logging.getLogger(__name__)

#: Exit status of a run that saved and ended on SIGTERM: 128 + 15, as in shells.
EXIT_STOPPED = 128 + signal.SIGTERM
#: Exit status of a run that did not save within the grace period: EX_TEMPFAIL.
EXIT_NOT_SAVED = 75

# Seconds until a process with nothing to save is ended by force.
_PROMPTLY = 2.0


class Stopped(SystemExit):
    """The run ends on SIGTERM, with everything saved."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


class StopOnSignal(HookBase):
    """On SIGTERM: finish the step, save a checkpoint, exit with :data:`EXIT_STOPPED`.

    SLURM and spot instances send it seconds before they kill. All processes stop after the same
    step, whichever of them gets the signal. Inside :meth:`saved` (an evaluation) each process that
    gets it stops at once. A process that has not ended after the grace period, for example because
    it waits for a dead one, is ended with :data:`EXIT_NOT_SAVED`.
    """

    def __init__(self, grace_period: float, *, key: str = "grace_period") -> None:
        """
        Args:
            grace_period: in seconds.
            key: what it is called in the user's config.
        """
        self.grace_period, self._key = grace_period, key
        self._watch: SigtermWatch | None = None
        self._saved = False
        self._leaving = False

    def before_train(self) -> None:
        """Take over the signal, which only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._watch = SigtermWatch(self._request, self._end_if_late)

    def after_step(self) -> None:
        """Save and leave if any process was asked to; other hooks save the last step."""
        if self.trainer.should_stop and self.trainer.iter + 1 < self.trainer.max_iter:
            iteration = self.trainer.iter
            logger.warning(
                "SIGTERM: saving a checkpoint at iteration %d, then stopping.", iteration
            )
            self.trainer.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            comm.synchronize()
            self._saved = True
            self._leave()

    @contextmanager
    def saved(self) -> Iterator[None]:
        """Mark that everything is saved: inside, SIGTERM may end the process anywhere.

        Every process must enter. If any was asked to end before, all leave here.

        Raises:
            Stopped: at any point, on the signal.
        """
        asked = any(comm.all_gather(self.trainer.stop_requested))
        self._saved = True
        if asked or self.trainer.stop_requested:
            self._leave()
        yield
        # After an error it stays saved.
        self._saved = False

    def give_back(self) -> None:
        """Restore the handler: the training and its last evaluation are over."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _request(self) -> None:
        self.trainer.request_stop()
        # Once: a second signal must not interrupt the exit.
        if self._saved and not self._leaving:
            # Not by the log: the signal may have interrupted a write to it.
            os.write(2, b"SIGTERM: stopping; all that was trained is saved.\n")
            self._leave()

    def _leave(self) -> NoReturn:
        self._leaving = True
        raise Stopped

    def _end_if_late(self, over: threading.Event) -> None:
        """In a thread of its own: end the process if it is late."""
        if over.wait(min(self.grace_period, _PROMPTLY) if self._saved else self.grace_period):
            return
        if not self._saved:
            message = f"SIGTERM: not saved within {self._key} ({self.grace_period:g} s).\n"
            os.write(2, message.encode())
        # Nothing else interrupts a thread that waits for a dead process.
        os._exit(EXIT_STOPPED if self._saved else EXIT_NOT_SAVED)


class SigtermWatch:
    """Takes over SIGTERM: a handler in the main thread, and a thread that ends a late process.

    Python runs handlers in the main thread alone, and not while that waits inside of torch for
    another process. Python does write the signal's number to a file at once, which wakes the
    thread.
    """

    def __init__(
        self, handler: Callable[[], None], on_first: Callable[[threading.Event], None]
    ) -> None:
        """
        Args:
            handler: called in the main thread, on each signal.
            on_first: called in the other, on the first, with an event that is set by
                :meth:`close`.

        Raises:
            ValueError: this is not the main thread.
        """
        global _watching
        self._on_first = on_first
        self._over = threading.Event()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handler_before = signal.signal(signal.SIGTERM, lambda _signal, _frame: handler())
        self._file_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._wait, name="SIGTERM", daemon=True)
        self._thread.start()
        _watching = True

    def close(self) -> None:
        """Restore the handler."""
        global _watching
        _watching = False
        signal.set_wakeup_fd(self._file_before)
        signal.signal(signal.SIGTERM, self._handler_before)
        self._over.set()
        with suppress(BlockingIOError):  # full: the thread is awake
            os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _wait(self) -> None:
        # Other signals with a handler come here as well.
        while signal.SIGTERM not in os.read(self._read, 512):
            if self._over.is_set():
                return
        self._on_first(self._over)


# A forked child (of multiprocessing.Pool) inherits the handler and the file and must use neither:
# signals are blocked until it has dropped both.
_watching = False
_forking = threading.local()


def _before_fork() -> None:
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _after_fork_in_child() -> None:
    if _watching:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _after_fork()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
)


def forward_sigterm() -> None:
    """Pass SIGTERM on from this process to those that it spawns.

    Before there are any, this process ends (:class:`Stopped`).
    """

    def forward(_signal: int, _frame: FrameType | None) -> None:
        children = multiprocessing.active_children()
        for child in children:
            child.terminate()
        if not children:
            raise Stopped

    signal.signal(signal.SIGTERM, forward)


def die_with_parent(parent: int) -> None:
    """Let the kernel end this process when its parent ends, in any way. Linux only.

    Args:
        parent: its process id. If it has ended already, this process ends here.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
