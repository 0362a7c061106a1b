"""Exact resume: what a checkpoint holds of a training beside the weights, and how it is taken up.

Which checkpoint a resume takes is up to :class:`ssim_kd.checkpoint.StudentCheckpointer`; the order
of images, to :class:`ssim_kd.data.TrainLoader`; random numbers, to
:class:`ssim_kd.engine.hooks.Reseed`.
"""

import json
import logging
import os
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.engine.train_loop import TrainerBase
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils.file_io import PathManager
from torch import nn

from ..checkpoint import ResumeError
from ..data import TrainLoader

logger = logging.getLogger(__name__)

# Keys that change nothing in what a run computes.
_LEFT_OUT = ("OUTPUT_DIR", "TRACKING")


def settings_of(cfg: CfgNode) -> str:
    """Every key and value of a config, as JSON that :func:`differences` reads."""
    return json.dumps(dict(_leaves(cfg)), sort_keys=True, default=str)


def differences(ours: str, theirs: str) -> list[str]:
    """What two texts of :func:`settings_of` differ in.

    Returns:
        a line for each key: "KEY: value in ``ours`` (was: value in ``theirs``)".
    """
    now, was = json.loads(ours), json.loads(theirs)
    return [
        f"{key}: {now.get(key, 'no such key')} (was: {was.get(key, 'no such key')})"
        for key in sorted(now.keys() | was.keys())
        if now.get(key) != was.get(key)
    ]


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if prefix + key in _LEFT_OUT:
            continue
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


class ExactResume(DefaultTrainer):
    """The part of a trainer that saves its state and takes it up again.

    Attributes:
        student: the detector whose weights are saved.
        teacher_sha256: of the teacher's weights; "" without a teacher.
        seed: of the run: SEED, or what was drawn if that is negative.
    """

    student: nn.Module
    teacher_sha256: str
    seed: int
    _trainer: Any
    _started_with: str

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from the last checkpoint of OUTPUT_DIR, or start from ``MODEL.WEIGHTS``.

        Args:
            resume: where there is a checkpoint, restore all of the training's state from it.

        Raises:
            ValueError: weights or a checkpoint that do not fit.
        """
        resumed = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if not resumed and not self.cfg.MODEL.WEIGHTS:
            self._warn_of_random_frozen()
        if resumed:
            self.start_iter = self.iter + 1
            if self.start_iter >= self.max_iter:
                logger.warning(
                    "The checkpoint is at iteration %d and SOLVER.MAX_ITER is %d: nothing is left "
                    "to train.",
                    self.iter,
                    self.max_iter,
                )
            final = os.path.join(self.cfg.OUTPUT_DIR, "model_final.pth")
            # The run was killed between its last periodic checkpoint and the final one.
            if self.iter == self.max_iter - 1 and not PathManager.isfile(final):
                self.checkpointer.save("model_final", iteration=self.iter)

    def _warn_of_random_frozen(self) -> None:
        frozen = [name for name, p in self.student.named_parameters() if not p.requires_grad]
        norms = [m for m in self.student.modules() if isinstance(m, FrozenBatchNorm2d)]
        if frozen or norms:
            logger.warning(
                "MODEL.WEIGHTS is empty, so that the student starts from random weights, of which "
                "%d tensors and %d FrozenBN layers will never be trained: training is likely to "
                "diverge. From scratch, use MODEL.BACKBONE.FREEZE_AT 0 and MODEL.RESNETS.NORM "
                "'GN' or 'BN'.",
                len(frozen),
                len(norms),
            )

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs beside the weights."""
        # Nothing that is not finite gets saved.
        self._trainer.flush()
        state = TrainerBase.state_dict(self)
        state["teacher_sha256"] = self.teacher_sha256
        state["config"] = self._started_with
        state["skipped_steps"] = self._trainer.skipped
        exact = isinstance(self.data_loader, TrainLoader)
        state["data"] = self.data_loader.state_dict() if exact else {"seed": self.seed}
        state["optimizer"] = self.optimizer.state_dict()
        state["grad_scaler"] = self._trainer.grad_scaler.state_dict()
        # RetinaNet and FCOS keep a running mean in a plain attribute.
        normalizer: Any = getattr(self.student, "loss_normalizer", None)
        if normalizer is not None:
            state["loss_normalizer"] = float(normalizer)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up :meth:`state_dict`.

        Raises:
            ResumeError: the run was trained with another teacher, or not by this trainer.
        """
        if "teacher_sha256" not in state_dict:
            raise ResumeError(
                "--resume: the checkpoint was written by another trainer, e.g. Detectron2's own, "
                "and lacks what an exact resume needs. Start from its weights instead: "
                "MODEL.WEIGHTS, another OUTPUT_DIR, no --resume."
            )
        if state_dict["teacher_sha256"] != self.teacher_sha256:
            raise ResumeError(
                "--resume: the checkpoint was trained with the teacher of SHA-256 "
                f"{state_dict['teacher_sha256'] or '(none)'}, but MODEL.DISTILL.TEACHER is that of "
                f"{self.teacher_sha256 or '(none)'}. Resume with the former, or start anew in "
                "another OUTPUT_DIR."
            )
        self._warn_of_changes(state_dict["config"])
        if "loss_normalizer" in state_dict:
            self.student.loss_normalizer = state_dict["loss_normalizer"]
        TrainerBase.load_state_dict(self, state_dict)
        self._trainer.skipped = state_dict["skipped_steps"]
        self.seed = int(state_dict["data"]["seed"])
        if isinstance(self.data_loader, TrainLoader):
            self.data_loader.resume(self.iter + 1, state_dict["data"])
        else:
            logger.warning(
                "--resume: the training loader, a %s, begins anew: from here on the order of "
                "images is not that of an uninterrupted run.",
                type(self.data_loader).__name__,
            )
        self.optimizer.load_state_dict(state_dict["optimizer"])
        if state_dict["grad_scaler"]:  # else the run began without a scaler
            self._trainer.grad_scaler.load_state_dict(state_dict["grad_scaler"])

    def _warn_of_changes(self, started_with: str) -> None:
        changes = differences(settings_of(self.cfg), started_with)
        if changes:
            logger.warning(
                "--resume: the config is not the one that the run was started with. %s. Learning "
                "rate, momentum and weight decay go on as they were, and so does a SEED; all else "
                "follows the config of now. To change those, start anew in another OUTPUT_DIR.",
                "; ".join(changes),
            )
        # The next resume warns again.
        self._started_with = started_with
