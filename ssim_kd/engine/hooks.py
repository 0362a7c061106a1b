"""Hooks of the trainer."""

import contextlib
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage, get_event_storage
from fvcore.nn.precise_bn import update_bn_stats
from torch import distributed as dist
from torch import nn

from ..checkpoint import BEST, FINAL
from ..modeling import unwrap
from ..trackers import Accessory
from .evaluation import box_ap
from .signals import StopOnSignal

logger = logging.getLogger(__name__)


class Reseed(HookBase):
    """Seeds every generator before each step from (the trainer's seed, iteration, rank).

    A step then draws the same numbers whether or not the run was interrupted before it.
    """

    def before_step(self) -> None:
        """Seed Python, NumPy and torch."""
        # A hash, since neighbouring seeds give related streams in some generators.
        text = f"{self.trainer.seed}/{self.trainer.iter}/{comm.get_rank()}".encode()
        seed_all_rng(int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little"))


class PreciseBN(hooks.PreciseBN):
    """Detectron2's PreciseBN, whose images depend only on the seed and the iteration.

    Detectron2's own continues with one iterator, which a resumed run cannot take up. The teacher
    and the distillers, whose outputs it would discard, are not run.
    """

    def update_stats(self) -> None:
        """Replace the running statistics by those over ``num_iter`` batches."""
        if self._disabled:
            return
        self._data_loader.seed = self.trainer.seed
        self._data_loader.start_iter = self.trainer.iter + 1
        logger.info("Precise statistics of batch norms: %d iterations.", self._num_iter)
        # A separate storage discards what the model logs.
        with EventStorage(), contextlib.closing(iter(self._data_loader)) as batches:
            update_bn_stats(self._model, itertools.islice(batches, self._num_iter), self._num_iter)


def share_buffers(model: nn.Module) -> None:
    """Give every process the main one's buffers, which checkpoints hold.

    Batch norms that train have other running statistics on each process. Nothing but an evaluation
    reads those of the others.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


class RankStates(HookBase):
    """Gathers, before a checkpoint, the state that differs by process.

    RetinaNet and FCOS keep the running mean of the number of positive anchors in a plain attribute,
    ``loss_normalizer``: a resumed run needs that of each process.
    """

    def __init__(self, student: nn.Module, is_due: Callable[[], bool]) -> None:
        """
        Args:
            student: the detector.
            is_due: whether a checkpoint follows the step; the same on every process.
        """
        self._student = student
        self._is_due = is_due
        self._normalizers: list[float] = []
        self._iteration = -1

    def after_step(self) -> None:
        """Gather, before the hooks that save."""
        normalizer: Any = getattr(self._student, "loss_normalizer", None)
        if normalizer is not None and self._is_due():
            self._normalizers = comm.all_gather(float(normalizer))
            self._iteration = self.trainer.iter

    def state_dict(self) -> dict[str, Any]:
        """One value a process, by rank; this one's only if it is the user's code that saves."""
        own: Any = getattr(self._student, "loss_normalizer", None)
        if own is None:
            return {}
        gathered = self._iteration == self.trainer.iter
        return {"loss_normalizer": self._normalizers if gathered else [float(own)]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up this process's value; with more processes than before, the first one's."""
        values = state_dict["loss_normalizer"]
        rank = comm.get_rank()
        self._student.loss_normalizer = values[rank if rank < len(values) else 0]


class VisualizeDistillation(HookBase):
    """Puts the SSIM loss maps of a few fixed images into TensorBoard, level by level.

    The images are the same every time, so that the pictures show how the student approaches its
    teacher. An error ends the pictures, not the training.
    """

    def __init__(
        self,
        period: int,
        load: Callable[[], list[dict[str, Any]]],
        *,
        image_format: str = "BGR",
        key: str = "vis_period",
    ) -> None:
        """
        Args:
            period: in iterations, > 0.
            load: returns the images as the model takes them; called once. A picture has a row for
                each.
            image_format: their channel order.
            key: what the period is called in the user's config.
        """
        self._period, self._load, self._image_format = period, load, image_format
        self._inputs: list[dict[str, Any]] = []
        self._accessory = Accessory(f"Drawing loss maps every {key} {period}")

    def after_step(self) -> None:
        """Draw, at the end of each period."""
        if (self.trainer.iter + 1) % self._period or self._accessory.failed:
            return
        with self._accessory.guard():
            self._draw()

    def _draw(self) -> None:
        from ..visualization import loss_map_images  # needs matplotlib: half a second

        self._inputs = self._inputs or self._load()
        model = unwrap(self.trainer.model)
        training = model.training
        try:
            images = loss_map_images(model, self._inputs, input_format=self._image_format)
        finally:
            model.train(training)
        for level, image in images.items():
            get_event_storage().put_image(f"distill/{level}", image.transpose(2, 0, 1))


class BestCheckpoint(HookBase):
    """Keeps a copy of the checkpoint with the highest box AP on the first test set.

    It is ``model_best.pth``. Which one is best is part of the checkpoints, so that a resumed run
    knows it. ``--resume`` takes the last checkpoint, not the best.
    """

    def __init__(self) -> None:
        self._best: dict[str, float] = {}
        self._offered = False

    def offer(self, results: Mapping[str, Any]) -> None:
        """Compare the results of an evaluation, whose checkpoint was saved before it.

        Args:
            results: by task, or by data set if there are several; empty but on the main process.
        """
        ap = box_ap(results)
        self._offered = self._offered or bool(results)
        saved = self.trainer.checkpointer.get_checkpoint_file() if results else ""
        # Of equal ones the later, as after evaluations of 0. NaN is never the best.
        if ap >= self._best.get("AP", 0.0) and saved:
            # The last evaluation comes after the loop, whose iter is then max_iter.
            iteration = min(self.trainer.iter, self.trainer.max_iter - 1)
            self._best = {"AP": ap, "iteration": int(iteration)}
            self.trainer.checkpointer.keep_best()

    def after_train(self) -> None:
        """Log which checkpoint was the best, if it can be read."""
        if not self._best:
            if self._offered:
                logger.info(
                    "No %s: no evaluation had a box AP. %s is the last student.",
                    *(BEST, FINAL),
                )
            return
        path = os.path.join(self.trainer.checkpointer.save_dir, BEST)
        best = f"{path}, box AP {self._best['AP']:.2f} at iteration {self._best['iteration']}"
        try:
            iteration = self.trainer.checkpointer.read(BEST).get("iteration")
        except (ValueError, OSError) as error:
            logger.warning("The best checkpoint, %s, cannot be read: %s", best, error)
            return
        if iteration == self._best["iteration"]:
            logger.info("Best checkpoint: %s.", best)
        else:
            logger.warning("The best checkpoint, %s, is missing: it is of %s.", best, iteration)

    def state_dict(self) -> dict[str, float]:
        """The best AP and its iteration; {} before the first evaluation."""
        return dict(self._best)

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Take up :meth:`state_dict`."""
        self._best = dict(state_dict)


class SavedEvaluation(hooks.EvalHook):
    """Detectron2's EvalHook; a checkpoint is saved before, so that SIGTERM may cut it anywhere.

    If an evaluation was due at the checkpoint, the resumed run evaluates first.
    What is evaluated on every process is what is saved: the norms' statistics of the main one.
    """

    def __init__(self, period: int, function: Callable[[], Any], stop: StopOnSignal) -> None:
        """
        Args:
            period: in iterations; 0: only after the last.
            function: evaluates.
            stop: the hook that handles SIGTERM; runs before this one.
        """
        super().__init__(period, function)
        self._every = period
        self._stop = stop

    def before_train(self) -> None:
        """Make an evaluation that was cut again."""
        first = self.trainer.start_iter
        if first and self._due(first):
            self.trainer.iter = self.trainer.storage.iter = first - 1
            self._evaluate()
            self.trainer.iter = self.trainer.storage.iter = first

    def after_step(self) -> None:
        """Save and evaluate, every so many iterations."""
        iteration = self.trainer.iter
        if self._due(iteration + 1):
            if self.trainer.checkpointer.last_saved != iteration:
                self.trainer.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            self._evaluate()

    def after_train(self) -> None:
        """Evaluate; the final checkpoint exists."""
        share_buffers(self.trainer.student)
        with self._stop.saved():
            super().after_train()

    def _due(self, done: int) -> bool:
        return self._every > 0 and done % self._every == 0 and done < self.trainer.max_iter

    def _evaluate(self) -> None:
        share_buffers(self.trainer.student)
        with self._stop.saved():
            super().after_step()
