"""Hooks of the trainer."""

import hashlib
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import get_event_storage

from ..visualization import loss_map_images
from .signals import StopOnSignal


class Reseed(HookBase):
    """Seeds every generator before each step from (the trainer's seed, iteration, rank).

    A step then draws the same numbers whether or not the run was interrupted before it.
    """

    def before_step(self) -> None:
        """Seed Python, NumPy and torch."""
        # A hash, since neighbouring seeds give related streams in some generators.
        text = f"{self.trainer.seed}/{self.trainer.iter}/{comm.get_rank()}".encode()
        seed_all_rng(int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little"))


class VisualizeDistillation(HookBase):
    """Puts the SSIM loss maps of a few fixed images into TensorBoard, level by level.

    The images are the first of ``DATASETS.TEST`` (of ``DATASETS.TRAIN`` where there is none), the
    same every time, so that the pictures show how the student approaches its teacher.
    """

    def __init__(self, cfg: CfgNode, *, num_images: int = 3) -> None:
        """
        Args:
            cfg: of the training; ``VIS_PERIOD`` is in iterations and > 0.
            num_images: rows of each picture.
        """
        self._cfg = cfg
        self._num_images = num_images
        self._inputs: list[dict[str, Any]] = []

    def after_step(self) -> None:
        """Draw, every ``VIS_PERIOD`` iterations."""
        if (self.trainer.iter + 1) % self._cfg.VIS_PERIOD:
            return
        if not self._inputs:
            self._inputs = self._load()
        model = getattr(self.trainer.model, "module", self.trainer.model)
        images = loss_map_images(model, self._inputs, input_format=self._cfg.INPUT.FORMAT)
        for level, image in images.items():
            get_event_storage().put_image(f"distill/{level}", image.transpose(2, 0, 1))

    def _load(self) -> list[dict[str, Any]]:
        name = (*self._cfg.DATASETS.TEST, *self._cfg.DATASETS.TRAIN)[0]
        mapper = DatasetMapper(self._cfg, is_train=False)
        return [mapper(record) for record in DatasetCatalog.get(name)[: self._num_images]]


class SavedEvaluation(hooks.EvalHook):
    """Detectron2's EvalHook; what was trained is saved before, so that it may be cut anywhere.

    A run that is resumed from a checkpoint behind which an evaluation was due begins with that.
    """

    def __init__(self, period: int, function: Callable[[], Any], stop: StopOnSignal) -> None:
        """
        Args:
            period: in iterations; 0 for after the last alone.
            function: evaluates.
            stop: the hook that answers to SIGTERM; runs before this one.
        """
        super().__init__(period, function)
        self._every = period
        self._stop = stop

    def before_train(self) -> None:
        """Make up for an evaluation that was cut."""
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
        """Evaluate; the final checkpoint is there."""
        with self._stop.saved():
            super().after_train()

    def _due(self, done: int) -> bool:
        return self._every > 0 and done % self._every == 0 and done < self.trainer.max_iter

    def _evaluate(self) -> None:
        with self._stop.saved():
            super().after_step()
