"""SIGTERM and Ctrl-C: an orderly end, also in compiled code; processes that end with their parent.

- :class:`StopOnSignal` is the hook that saves and leaves.
- :class:`SignalWatch` takes the signals over.
- :func:`forward_signals` and :func:`die_with_parent` are for launchers and what they spawn.
"""

import ctypes
import logging
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from detectron2.engine import HookBase
from detectron2.utils import comm

logger = logging.getLogger(__name__)

#: Exit status of a run that saved and ended on SIGTERM: 128 + 15, as in shells.
EXIT_STOPPED = 128 + signal.SIGTERM
#: Exit status on a second Ctrl-C: 128 + 2.
EXIT_INTERRUPTED = 128 + signal.SIGINT
#: Exit status of a run that did not save within the grace period: EX_TEMPFAIL.
EXIT_NOT_SAVED = 75

# Seconds until a process with nothing to save is ended by force.
_PROMPTLY = 2.0


class Stopped(SystemExit):
    """The run ends on SIGTERM or Ctrl-C, with everything saved."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


def _handle(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Handle SIGTERM and SIGINT; returns the handlers before.

    SIGINT stays as it is if it is ignored, as in a shell's background, or has another handler than
    Python's.
    """
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    return {number: signal.signal(number, handler) for number in numbers}


def _restore(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


class StopOnSignal(HookBase):
    """On SIGTERM or Ctrl-C: finish the step, save a checkpoint, exit with :data:`EXIT_STOPPED`.

    SLURM and spot instances send SIGTERM seconds before they kill. A second Ctrl-C ends the process
    at once. All processes stop after the same
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
        self._watch: SignalWatch | None = None
        self._saved = False
        self._leaving = False

    def before_train(self) -> None:
        """Take over the signals, which only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._watch = SignalWatch(self._request, self._patience, self._end)

    def after_step(self) -> None:
        """Save and leave if any process was asked to; other hooks save the last step."""
        if self.trainer.should_stop and self.trainer.iter + 1 < self.trainer.max_iter:
            iteration = self.trainer.iter
            logger.warning(
                "Asked to stop: saving a checkpoint at iteration %d first. A second Ctrl-C does "
                "not wait for it.",
                iteration,
            )
            self.trainer.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            comm.synchronize()
            self._saved = True
            self._leave()

    @contextmanager
    def saved(self) -> Iterator[None]:
        """Mark that everything is saved: inside, the signals may end the process anywhere.

        Every process must enter. If any was asked to end before, all leave here.

        Raises:
            Stopped: at any point, on a signal.
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
        self.trainer.stop_requested = True
        # Once: a second signal must not interrupt the exit.
        if self._saved and not self._leaving:
            # Not by the log: the signal may have interrupted a write to it.
            os.write(2, b"Asked to stop: all that was trained is saved.\n")
            self._leave()

    def _leave(self) -> NoReturn:
        self._leaving = True
        raise Stopped

    def _patience(self) -> float:
        """Seconds that the process has to end by itself."""
        return min(self.grace_period, _PROMPTLY) if self._saved else self.grace_period

    def _end(self) -> NoReturn:
        """End the process, which is late; called in another thread."""
        saved = self._saved or self.trainer.checkpointer.last_saved == self.trainer.iter
        if not saved:
            message = f"Not saved within {self._key} ({self.grace_period:g} s).\n"
            os.write(2, message.encode())
        # Nothing else interrupts a thread that waits for a dead process.
        os._exit(EXIT_STOPPED if saved else EXIT_NOT_SAVED)


class SignalWatch:
    """Takes over SIGTERM and SIGINT: a handler in the main thread, and a thread for late ones.

    Python runs handlers only in the main thread, and not while that waits inside of torch for
    another process. Python does write the signal's number to a file at once, which wakes the
    thread.
    """

    def __init__(
        self,
        handler: Callable[[], None],
        patience: Callable[[], float],
        end: Callable[[], NoReturn],
    ) -> None:
        """
        Args:
            handler: called in the main thread, on each signal.
            patience: called in the other, on the first signal; how many seconds later ``end`` is
                called there, unless :meth:`close` comes first.
            end: ends the process.

        Raises:
            ValueError: this is not the main thread.
        """
        global _watching
        self._patience, self._end = patience, end
        self._over = threading.Event()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = _handle(lambda _signal, _frame: handler())
        self._file_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._wait, name="SIGTERM", daemon=True)
        self._thread.start()
        _watching = True

    def close(self) -> None:
        """Restore the handlers."""
        global _watching
        _watching = False
        signal.set_wakeup_fd(self._file_before)
        _restore(self._before)
        self._over.set()
        with suppress(BlockingIOError):  # full: the thread is awake
            os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _wait(self) -> None:
        interrupts, end = 0, None
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            ready, _, _ = select.select([self._read], [], [], left)
            if self._over.is_set():
                return
            if not ready:
                self._end()
            # Other signals with a handler come here as well.
            found = [number for number in os.read(self._read, 512) if number in self._before]
            interrupts += found.count(signal.SIGINT)
            if interrupts > 1:
                os._exit(EXIT_INTERRUPTED)
            if found and end is None:
                end = time.monotonic() + self._patience()


# A forked child (of multiprocessing.Pool) inherits the handler and the file and must use neither:
# signals are blocked until it has dropped both.
_watching = False
_forking = threading.local()


def _before_fork() -> None:
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _after_fork_in_child() -> None:
    if _watching:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # A terminal's Ctrl-C reaches all processes: this one's parent ends it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    _after_fork()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
)


@contextmanager
def forward_signals() -> Iterator[None]:
    """Inside, pass SIGTERM on from this process to those that it spawns, and Ctrl-C as SIGTERM.

    Before there are any, this process ends (:class:`Stopped`). A second Ctrl-C ends all at once.
    """
    interrupts = 0

    def forward(number: int, _frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            os._exit(EXIT_INTERRUPTED)  # die_with_parent
        children = multiprocessing.active_children()
        for child in children:
            child.terminate()
        if not children:
            raise Stopped

    before = _handle(forward)
    try:
        yield
    finally:
        _restore(before)


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
