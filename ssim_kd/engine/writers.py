"""Metrics: the scalars of a step, read late, and writers that stop no training."""

import math
from collections.abc import Sequence

import torch
from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter
from torch import distributed as dist

from ..trackers import Accessory


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

    Its writers keep only the latest value of a metric: of evaluations between two periods they
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


# Name of the wish to stop among the scalars of a report.
_STOP = "stop"


class StepReport:
    """The scalars of one step, as the mean over the processes.

    Made right after the step; the copy to the host does not make the step wait. A value that is
    not finite on one process is so on all after the mean, and so is the wish to stop: what one
    process concludes from a report, all conclude.

    Attributes:
        iteration: of the step.
        images: ids of this process's images.
        values: by name, after :meth:`read`.
        stop: whether any process wants to stop, after :meth:`read`.
    """

    def __init__(
        self,
        iteration: int,
        *,
        losses: dict[str, torch.Tensor],
        metrics: dict[str, torch.Tensor],
        health: dict[str, torch.Tensor],
        stop: bool,
        data_time: float,
        images: list[str],
    ) -> None:
        """
        Args:
            iteration: of the step.
            losses: scalars that add up to the total.
            metrics: further scalars to be logged.
            health: scalars that are not logged and should be finite.
            stop: whether this process wants to stop.
            data_time: seconds spent waiting for the batch.
            images: ids.
        """
        self.iteration, self.images, self.data_time = iteration, images, data_time
        self.values: dict[str, float] = {}
        self.stop = False
        self._losses = list(losses)
        self._health = list(health)
        scalars = {**losses, **metrics, **health}
        self._names = [*scalars, _STOP]
        first = next(iter(losses.values()))
        stacked = torch.stack(
            [
                *(value.detach().float().reshape(()) for value in scalars.values()),
                torch.full((), float(stop), device=first.device),
            ]
        )
        if comm.get_world_size() > 1:
            dist.all_reduce(stacked)
            stacked /= comm.get_world_size()
        self._ready: torch.cuda.Event | None = None
        self._host = stacked
        if stacked.is_cuda:
            self._host = torch.empty(stacked.shape, pin_memory=True)
            self._host.copy_(stacked, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def read(self) -> None:
        """Wait until the values have arrived."""
        if self._ready is not None:
            self._ready.synchronize()
        self.values = dict(zip(self._names, self._host.tolist(), strict=True))
        self.stop = self.values.pop(_STOP) > 0

    def not_finite(self) -> list[str]:
        """The names of the values that are NaN or infinite: features first, they are the cause."""
        wrong = [name for name, value in self.values.items() if not math.isfinite(value)]
        return sorted(wrong, key=lambda name: (name not in self._health, name not in self._losses))

    def log(self, storage: EventStorage) -> None:
        """Put the metrics where Detectron2's writers find them, under the step's own iteration."""
        values = {name: self.values[name] for name in self._names[:-1] if name not in self._health}
        total = sum(values[name] for name in self._losses)
        now, storage.iter = storage.iter, self.iteration
        storage.put_scalars(data_time=self.data_time, total_loss=total, **values)
        storage.iter = now
