"""One training step (forward, backward, optimizer), and what is done if it is not finite."""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..modeling import unwrap
from .settings import Settings
from .writers import StepReport

logger = logging.getLogger(__name__)

#: The gradient scaler starts at 65536 and halves at each overflow; no loss is that steep.
LEAST_SCALE = 2.0**-10


class NonFiniteError(FloatingPointError):
    """A loss, a gradient or a feature map is NaN or infinite.

    Attributes:
        fatal: whether the step cannot be skipped.
    """

    def __init__(self, message: str, *, fatal: bool) -> None:
        super().__init__(message)
        self.fatal = fatal


def _is_news(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], NonFiniteError))


# Detectron2 logs the traceback of what ends a training. Ours is logged, or raised, anyway.
logging.getLogger("detectron2.engine.train_loop").addFilter(_is_news)


Scalars = dict[str, torch.Tensor]


class DistillStep(TrainerBase):
    """Detectron2's SimpleTrainer and AMPTrainer in one, on any device.

    - Mixed precision is float16 with a gradient scaler on a GPU and bfloat16 on a CPU.
    - Values that are logged travel to the host after the step, so that no step waits for them;
      what is not finite therefore stops a GPU run one step later, before anything is saved.
    - The iterator over the data is made at the first step, when the place to resume at is known.

    Attributes:
        settings: what is read of them: ``amp``, ``accumulate``, ``max_skipped_steps``,
            ``log_period``, ``eval_period``, and ``output_dir`` for the report on such a step.
        skipped: steps that were left out.
        stop_requested: set it to ask for an orderly end after the current step.
        should_stop: whether any process asked; the same on all of them after each step.
    """

    # Plain attributes: DefaultTrainer, which DistillTrainer is as well, has properties.
    model: nn.Module = None  # type: ignore[assignment]
    data_loader: Any = None
    optimizer: torch.optim.Optimizer = None  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
    ) -> None:
        """
        Args:
            model: takes a batch, returns a dict of scalar losses; wrapped in DDP or not.
            data_loader: an iterable of batches; one that ends is iterated again.
            optimizer: of the model's parameters.
            settings: of the training.
        """
        # By name: DefaultTrainer builds its own parts.
        TrainerBase.__init__(self)
        model.train()
        self.model, self.data_loader, self.optimizer = model, data_loader, optimizer
        self.settings = settings
        self.skipped = 0
        self.stop_requested = False
        self.should_stop = False
        self.device = next(model.parameters()).device
        self._data: Iterator | None = None
        self._pending: list[StepReport] = []
        self._gradients_checked = False
        self._dtype: torch.dtype | None = None
        if settings.amp:
            self._dtype = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        self.grad_scaler = torch.amp.GradScaler(
            self.device.type, enabled=self._dtype is torch.float16
        )

    def run_step(self) -> None:
        """Train on the next batch.

        Raises:
            NonFiniteError: more steps than ``max_skipped_steps`` were not finite.
        """
        if not self.model.training:
            raise RuntimeError("The model was put into eval mode while it was being trained.")
        start = time.perf_counter()
        batch = self._next_batch()
        data_time = time.perf_counter() - start

        allowed = self.settings.max_skipped_steps
        statistics = [b.clone() for b in self.model.buffers()] if allowed else []
        try:
            self._backward(batch, data_time)
        except NonFiniteError as error:
            self.skipped += 1
            if error.fatal or self.skipped > allowed:
                raise
            # What the forward has made of the batch norms' running means.
            for buffer, before in zip(self.model.buffers(), statistics, strict=True):
                buffer.copy_(before)
            logger.error("Step skipped (%d of %d): %s", self.skipped, allowed, error)
            return
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _next_batch(self) -> list[dict[str, Any]]:
        """The next batch; a loader that has ended begins again."""
        for _ in range(2):
            if self._data is None:
                self._data = iter(self.data_loader)
            for batch in self._data:
                return batch
            self._data = None
        raise ValueError(
            f"The training loader, a {type(self.data_loader).__name__}, has no batch at iteration "
            f"{self.iter}; expected batches without end, or what can be iterated over again and "
            "holds one batch or more (not an iterator or a generator, which ends for good)."
        )

    def _backward(self, batch: list[dict[str, Any]], data_time: float) -> None:
        """Make the gradients, and take in reports."""
        self.optimizer.zero_grad()
        settings = self.settings
        size = len(batch) // settings.accumulate
        if size * settings.accumulate != len(batch):
            raise ValueError(
                f"{settings.key('accumulate')} is {settings.accumulate}, but a process has "
                f"{len(batch)} images a step; expected a divisor."
            )
        parts = [batch[i : i + size] for i in range(0, len(batch), size)]
        with self._exact_jit():
            found = [self._backward_part(part, last=part is parts[-1]) for part in parts]
        losses, metrics, health = (_mean_of(scalars) for scalars in zip(*found, strict=True))
        if isinstance(self.model, DistributedDataParallel) and not self._gradients_checked:
            self._check_gradients(self.model)
        self._pending.append(self._report(losses, metrics, health, batch, data_time))
        # Read now on a CPU, if a step may be skipped, or if a writer is due; else a step late.
        at_once = (
            self.device.type == "cpu"
            or settings.max_skipped_steps > 0
            or any(
                period > 0 and (self.iter + 1) % period == 0
                for period in (settings.log_period, settings.eval_period)
            )
        )
        self.flush(keep=0 if at_once else 1)
        if at_once and self.grad_scaler.is_enabled() and self.grad_scaler.get_scale() < LEAST_SCALE:
            # A step or two that overflow are the scaler's business; these are NaN at any scale.
            wrong = f"gradients (float16, down to a loss scale of {LEAST_SCALE:g})"
            self._raise([wrong], self.iter, _image_ids(batch), {}, fatal=True)

    def _backward_part(self, part: list[dict[str, Any]], *, last: bool) -> tuple[Scalars, ...]:
        """Add the gradients of a part of the batch; returns its losses, metrics and health."""
        parallel = isinstance(self.model, DistributedDataParallel)
        # Processes exchange gradients once a step.
        with self.model.no_sync() if parallel and not last else nullcontext():  # type: ignore
            with torch.autocast(self.device.type, self._dtype) if self._dtype else nullcontext():
                try:
                    losses = self.model(part)
                except FloatingPointError as error:
                    # Detectron2's own check of the proposals.
                    self._raise_for_features(part, error)
                unlike = {k: tuple(v.shape) for k, v in losses.items() if v.numel() != 1}
                if unlike:
                    raise ValueError(f"The losses {unlike} are not scalars; expected one value.")
                total = sum(losses.values()) / self.settings.accumulate
            self.grad_scaler.scale(total).backward()
        losses = {name: loss.detach() for name, loss in losses.items()}
        return losses, dict(getattr(self._detector, "metrics", {})), self._health()

    def _exact_jit(self) -> AbstractContextManager[None]:
        """TorchScript rounds differently from its second call on, which a resumed run makes later.

        RetinaNet's focal loss is such a function. On a GPU its fused form saves too much to give
        up.
        """
        if self.device.type == "cpu":
            return torch.jit.optimized_execution(False)
        return nullcontext()

    def _check_gradients(self, model: DistributedDataParallel) -> None:
        """Stop before DDP, which names no parameter or waits without end."""
        self._gradients_checked = True
        if model.find_unused_parameters:
            return
        unused = [
            n for n, p in self._detector.named_parameters() if p.requires_grad and p.grad is None
        ]
        found = comm.all_gather(unused)
        if any(found):
            names = sorted({name for part in found for name in part})
            raise ValueError(
                f"{len(names)} trained parameters have no gradient in the first step: "
                f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. Several processes "
                "(DistributedDataParallel) need one for each. Expected every level of the backbone "
                "to be used by a loss: leave out the others (MODEL.FPN.IN_FEATURES, or "
                "IN_FEATURES of RPN, ROI_HEADS and DISTILL), or train in one process, or with "
                "train.ddp.find_unused_parameters of a LazyConfig."
            )

    def close(self) -> None:
        """End the iteration over the data, and with it the loader's workers."""
        close = getattr(self._data, "close", None)
        if close is not None:
            close()

    def flush(self, *, keep: int = 0) -> None:
        """Take in the reports of past steps: log their metrics, see whether to stop.

        Args:
            keep: how many of the latest steps to leave for later.

        Raises:
            NonFiniteError: a value that is NaN or infinite; names it, and where its batch and the
                run's state were written.
        """
        while len(self._pending) > keep:
            report = self._pending.pop(0)
            report.read()
            self.should_stop |= report.stop
            wrong = report.not_finite()
            if wrong:
                self._pending.clear()
                self._raise(wrong, report.iteration, report.images, report.values)
            if comm.is_main_process():
                report.log(get_event_storage())

    def _report(
        self,
        losses: Scalars,
        metrics: Scalars,
        health: Scalars,
        batch: list[dict[str, Any]],
        data_time: float,
    ) -> StepReport:
        # A gradient that overflows in float16 is the scaler's business.
        if not self.grad_scaler.is_enabled():
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            metrics["grad_norm"] = torch.nn.utils.get_total_norm(gradients)
        return StepReport(
            self.iter,
            losses=losses,
            metrics=metrics,
            health=health,
            stop=self.stop_requested,
            data_time=data_time,
            images=_image_ids(batch),
        )

    @property
    def _detector(self) -> nn.Module:
        return unwrap(self.model)

    def _health(self) -> dict[str, torch.Tensor]:
        return dict(getattr(self._detector, "health", {}))

    def _raise_for_features(self, batch: list[dict[str, Any]], error: Exception) -> NoReturn:
        """Say which features made the model stop in the middle of its forward."""
        self.flush()
        values = {name: float(value) for name, value in self._health().items()}
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        # The other processes wait for this one's gradients: none can go on.
        fatal = comm.get_world_size() > 1
        self._raise(
            wrong or [f"student ({error})"], self.iter, _image_ids(batch), values, fatal=fatal
        )

    def _raise(
        self,
        wrong: list[str],
        iteration: int,
        images: list[str],
        values: dict[str, float],
        *,
        fatal: bool = False,
    ) -> NoReturn:
        """Write a report on a step, and raise."""
        name = f"not_finite_{iteration:07d}_rank{comm.get_rank()}.json"
        path = os.path.join(self.settings.output_dir, name)
        bad = [
            name
            for name, p in self.model.named_parameters()
            if p.grad is not None and not torch.isfinite(p.grad).all()
        ]
        state = {
            "iteration": iteration,
            "rank": comm.get_rank(),
            "not_finite": wrong,
            "image_ids": images,
            "values": {name: repr(value) for name, value in values.items()},
            "parameters_with_such_gradients": bad,
            "learning_rates": [group["lr"] for group in self.optimizer.param_groups],
            "loss_scale": self.grad_scaler.get_scale(),
            "random_seed": torch.initial_seed(),
        }
        report = f"The batch and the state are in {path}."
        try:
            with open(path, "w") as file:
                json.dump(state, file, indent=1)
        except OSError as error:
            report = f"Images {images}; the report on the step was not written ({error})."
        raise NonFiniteError(
            f"Not finite at iteration {iteration}: {', '.join(wrong)}. {report} A lower learning "
            "rate, a longer warm-up or a lower weight of the distillation may help.",
            # A teacher never changes: no later step can be better.
            fatal=fatal or any(name.startswith("teacher ") for name in wrong),
        )


def _mean_of(parts: Sequence[Scalars]) -> Scalars:
    """The mean of each scalar over the parts of a batch."""
    if len(parts) == 1:
        return parts[0]
    return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}


def _image_ids(batch: list[dict[str, Any]]) -> list[str]:
    return [str(x.get("image_id", x.get("file_name", "?"))) for x in batch]
