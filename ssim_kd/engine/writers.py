"""Writers of metrics that stop no training."""

import contextlib
import logging
from collections.abc import Iterator, Sequence

from detectron2.engine import hooks
from detectron2.utils.events import EventWriter

logger = logging.getLogger(__name__)


class Accessory:
    """What a training goes on without: an error is reported once, and nothing is tried again."""

    def __init__(self, name: str) -> None:
        """
        Args:
            name: for the warning.
        """
        self.name = name
        self.failed = False

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Inside, an error is a warning."""
        try:
            yield
        except Exception as error:
            self.failed = True
            logger.warning(
                "%s failed and is left out from here on; the training goes on. %s: %s",
                *(self.name, type(error).__name__, error),
            )


class GuardedWriter(EventWriter):
    """A writer of metrics whose failure (a full disk, a tracker that is offline) stops no run."""

    def __init__(self, writer: EventWriter) -> None:
        """
        Args:
            writer: of Detectron2's or the user's.
        """
        self.writer = writer
        self._accessory = Accessory(f"The writer {type(writer).__name__}")
        self._closed = False

    def write(self) -> None:
        """Write the latest metrics."""
        if not self._accessory.failed and not self._closed:
            with self._accessory.guard():
                self.writer.write()

    def close(self) -> None:
        """Close the writer, once."""
        if not self._closed:
            self._closed = True
            with self._accessory.guard():
                self.writer.close()


class PeriodicWriter(hooks.PeriodicWriter):
    """Detectron2's PeriodicWriter, which also writes after each evaluation.

    Its writers keep the latest value of a metric alone: of evaluations between two periods they
    would lose all but the last.
    """

    def __init__(
        self, writers: Sequence[EventWriter], period: int = 20, *, eval_period: int = 0
    ) -> None:
        """
        Args:
            writers: of the metrics.
            period, eval_period: in iterations; an ``eval_period`` of 0 is none.
        """
        super().__init__(writers, period)
        self._eval_period = eval_period

    def before_train(self) -> None:
        """Write an evaluation that was made again, see :class:`.hooks.SavedEvaluation`."""
        if self.trainer.start_iter and self.trainer.storage.latest():
            self.trainer.storage.iter -= 1
            self._write()
            self.trainer.storage.iter += 1

    def after_step(self) -> None:
        """Write, where either period ends."""
        if self._eval_period > 0 and (self.trainer.iter + 1) % self._eval_period == 0:
            self._write()
        else:
            super().after_step()

    def _write(self) -> None:
        for writer in self._writers:
            writer.write()
