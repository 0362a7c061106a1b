"""SIGTERM as a process sees it even while its main thread waits in compiled code."""

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress


class SigtermWatch:
    """Takes SIGTERM over: a handler in the main thread, and a thread that sees that it acts.

    Python runs handlers in the main thread alone, and not while that waits for another process
    inside of torch. What Python does at once is to write the signal's number to a file, which
    wakes the thread.
    """

    def __init__(
        self, handler: Callable[[], None], see_to_it: Callable[[threading.Event], None]
    ) -> None:
        """
        Args:
            handler: called in the main thread, on each signal.
            see_to_it: called in the other, on the first, with an event that is set by
                :meth:`close`.

        Raises:
            ValueError: this is not the main thread.
        """
        global _watching
        self._see_to_it = see_to_it
        self._over = threading.Event()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handler_before = signal.signal(signal.SIGTERM, lambda _signal, _frame: handler())
        self._file_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._wait, name="SIGTERM", daemon=True)
        self._thread.start()
        _watching = True

    def close(self) -> None:
        """Give the signal back."""
        global _watching
        _watching = False
        signal.set_wakeup_fd(self._file_before)
        signal.signal(signal.SIGTERM, self._handler_before)
        self._over.set()
        with suppress(BlockingIOError):  # full, but then the thread has long been woken
            os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _wait(self) -> None:
        # Other signals with a handler come here as well.
        while signal.SIGTERM not in os.read(self._read, 512):
            if self._over.is_set():
                return
        self._see_to_it(self._over)


# A forked child (of multiprocessing.Pool) has the handler and the file: it must use neither. No
# signal may reach it before it has let go of them.
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
