"""Hooks of the trainer."""

import hashlib
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import get_event_storage

from ..visualization import loss_map_images


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
