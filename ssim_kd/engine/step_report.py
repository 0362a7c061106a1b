"""The scalars of a training step, averaged over the processes and read late."""

import math

import torch
import torch.distributed as dist
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

# Name of the wish to stop among the scalars of a report.
_STOP = "stop"


class StepReport:
    """The scalars of one step, as the mean over the processes.

    Made right behind the step; the copy to the host does not make the step wait. A value that is
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
