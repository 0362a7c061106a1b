"""An orderly end on SIGTERM."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from detectron2.engine import HookBase
from detectron2.utils import comm

from .sigterm import SigtermWatch

logger = logging.getLogger(__name__)

#: Exit status of a run that SIGTERM ended with all that it had trained saved: 128 + 15, as shells
#: have it.
EXIT_STOPPED = 128 + signal.SIGTERM
#: Exit status of a run that SIGTERM ended and that could not save in time: EX_TEMPFAIL.
EXIT_NOT_SAVED = 75

# Seconds until a process ends by force where there is nothing to save.
_PROMPTLY = 2.0


class Stopped(SystemExit):
    """The run was asked to end, and has saved."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


class StopOnSignal(HookBase):
    """On SIGTERM: finish the step, save a checkpoint, exit with :data:`EXIT_STOPPED`.

    SLURM and spot instances send it some seconds before they kill. All processes stop after the
    same step, whichever of them got the signal. What runs inside :meth:`saved`, an evaluation, is
    broken off at once by each process that got it. If a process has not ended after the grace
    period (as where it waits for one that has died), it is ended with :data:`EXIT_NOT_SAVED`.
    """

    def __init__(self, grace_period: float) -> None:
        """
        Args:
            grace_period: in seconds.
        """
        self.grace_period = grace_period
        self._watch: SigtermWatch | None = None
        self._saved = False
        self._leaving = False

    def before_train(self) -> None:
        """Take over the signal; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            self._watch = SigtermWatch(self._request, self._end_if_late)

    def after_step(self) -> None:
        """Save and leave if any process was asked to; the last step is saved by other hooks."""
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
        """Inside, all that was trained is saved, so that SIGTERM may end the process anywhere.

        Every process must enter. If any was asked to end before, all leave here.

        Raises:
            Stopped: wherever the signal meets the process.
        """
        asked = any(comm.all_gather(self.trainer.stop_requested))
        self._saved = True
        if asked or self.trainer.stop_requested:
            self._leave()
        yield
        # After an error it stays saved.
        self._saved = False

    def give_back(self) -> None:
        """Give the signal back: the training, its last evaluation included, is over."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _request(self) -> None:
        self.trainer.request_stop()
        # Once: a second signal must not interrupt the leaving.
        if self._saved and not self._leaving:
            # Not by the log, whose file this may have interrupted.
            os.write(2, b"SIGTERM: stopping; all that was trained is saved.\n")
            self._leave()

    def _leave(self) -> NoReturn:
        self._leaving = True
        raise Stopped

    def _end_if_late(self, over: threading.Event) -> None:
        """In a thread of its own: end the process if that has not happened in time."""
        if over.wait(min(self.grace_period, _PROMPTLY) if self._saved else self.grace_period):
            return
        if not self._saved:
            message = f"SIGTERM: not saved within SOLVER.GRACE_PERIOD ({self.grace_period:g} s).\n"
            os.write(2, message.encode())
        # A thread that waits for a dead process cannot be interrupted otherwise.
        os._exit(EXIT_STOPPED if self._saved else EXIT_NOT_SAVED)
