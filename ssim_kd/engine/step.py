"""One training step: forward, backward, optimizer; metrics are read late."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class DistillStep(TrainerBase):
    """Detectron2's SimpleTrainer and AMPTrainer in one, on any device.

    - Mixed precision is float16 with a gradient scaler on a GPU and bfloat16 on a CPU.
    - Values that are logged travel to the host behind the step, so that no step waits for them;
      a loss that is not finite therefore stops a GPU run one step later, before anything is saved.
    - The iterator over the data is made at the first step, when the place to resume at is known.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        amp: bool = False,
        log_period: int = 20,
    ) -> None:
        """
        Args:
            model: takes a batch, returns a dict of scalar losses; wrapped in DDP or not.
            data_loader: an iterable of batches without end.
            optimizer: of the model's parameters.
            amp: mixed precision.
            log_period: in iterations; every so often the metrics are brought up to date.
        """
        super().__init__()
        model.train()
        self.model = model
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.log_period = log_period
        self.device = next(model.parameters()).device
        self._data: Iterator | None = None
        self._pending: list[_Pending] = []
        self._dtype: torch.dtype | None = None
        if amp:
            self._dtype = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        self.grad_scaler = torch.amp.GradScaler(
            self.device.type, enabled=self._dtype is torch.float16
        )

    def run_step(self) -> None:
        """Train on the next batch."""
        if not self.model.training:
            raise RuntimeError("The model was put into eval mode while it was being trained.")
        if self._data is None:
            self._data = iter(self.data_loader)
        start = time.perf_counter()
        batch = next(self._data)
        data_time = time.perf_counter() - start

        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self._dtype) if self._dtype else nullcontext():
            losses = self.model(batch)
            total = sum(losses.values())
        self.grad_scaler.scale(total).backward()
        self._record(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _record(self, losses: dict[str, torch.Tensor], data_time: float) -> None:
        model = self.model
        if isinstance(model, DistributedDataParallel):
            model = model.module
        values = {**losses, **getattr(model, "metrics", {})}
        self._pending.append(_Pending(self.iter, list(losses), values, data_time))
        due = self.device.type == "cpu" or (self.iter + 1) % self.log_period == 0
        self.flush(keep=0 if due else 1)

    def flush(self, *, keep: int = 0) -> None:
        """Write the metrics of past steps into the EventStorage.

        Args:
            keep: how many of the latest steps to leave for later.

        Raises:
            FloatingPointError: a loss that is NaN or infinite; names it.
        """
        while len(self._pending) > keep:
            self._pending.pop(0).write(get_event_storage())


class _Pending:
    """The scalars of one step on their way to the host."""

    def __init__(
        self,
        iteration: int,
        losses: list[str],
        values: dict[str, torch.Tensor],
        data_time: float,
    ) -> None:
        self.iteration = iteration
        self.losses = losses
        self.names = list(values)
        self.data_time = data_time
        stacked = torch.stack([value.detach().float().reshape(()) for value in values.values()])
        if comm.get_world_size() > 1:
            # The mean over the processes; a NaN of one reaches all, so that all stop together.
            dist.all_reduce(stacked)
            stacked /= comm.get_world_size()
        self._ready: torch.cuda.Event | None = None
        if stacked.is_cuda:
            self._host = torch.empty(stacked.shape, pin_memory=True)
            self._host.copy_(stacked, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()
        else:
            self._host = stacked

    def write(self, storage: EventStorage) -> None:
        if self._ready is not None:
            self._ready.synchronize()
        values = dict(zip(self.names, self._host.tolist(), strict=True))
        total = sum(values[name] for name in self.losses)
        bad = {k: v for k, v in values.items() if v != v or abs(v) == float("inf")}
        if bad:
            raise FloatingPointError(
                f"Not finite at iteration {self.iteration}: {bad}. All values: {values}"
            )
        if not comm.is_main_process():
            return
        now, storage.iter = storage.iter, self.iteration
        storage.put_scalars(data_time=self.data_time, total_loss=total, **values)
        storage.iter = now
