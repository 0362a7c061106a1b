"""The meta-architecture: a stock student, a frozen teacher, and what is learned between them."""

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import nn

from ..config import student_config
from .batch import DistillBatch
from .distiller import Distiller, build_distiller
from .taps import FeatureTap
from .teacher import FrozenTeacher


@META_ARCH_REGISTRY.register()
class DistilledDetector(nn.Module):
    """A detector that learns from its data and from a frozen teacher.

    In training, its losses are the student's own and the distiller's. In evaluation it is the
    student.

    The student is whatever ``build_model`` makes of its config, untouched. The teacher is a plain
    object and no module: it is in no ``state_dict()``, ``parameters()``, ``modules()`` or DDP, and
    ``train()`` does not reach it; it follows the model's device.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: FrozenTeacher | None = None,
        distiller: Distiller | None = None,
    ) -> None:
        """
        Args:
            student: a detector with a Detectron2 ``backbone``.
            teacher, distiller: both, or neither: then this is the plain student.
        """
        super().__init__()
        if (teacher is None) != (distiller is None):
            raise ValueError("DistilledDetector needs both a teacher and a distiller, or neither.")
        self.student = student
        self.distiller = distiller
        self.teacher = teacher
        #: One scalar a level and model, finite where its features are; of the last step.
        self.health: dict[str, torch.Tensor] = {}
        self._tap = FeatureTap(student, distiller.levels) if distiller is not None else None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the student, then the teacher with its weights, then the distiller."""
        name = cfg.MODEL.DISTILL.STUDENT_META_ARCHITECTURE
        if name == cls.__name__ or name not in META_ARCH_REGISTRY:
            known = sorted({key for key, _ in META_ARCH_REGISTRY} - {cls.__name__})
            raise ValueError(
                f"MODEL.DISTILL.STUDENT_META_ARCHITECTURE is {name!r}; expected one of {known}."
            )
        try:
            student = build_model(student_config(cfg))
        except Exception as error:
            raise ValueError(
                f"The student cannot be built as MODEL.DISTILL.STUDENT_META_ARCHITECTURE {name!r} "
                f"from the rest of its config: {type(error).__name__}: {error}"
            ) from error
        if not cfg.MODEL.DISTILL.ENABLED:
            return {"student": student}
        # Neither the teacher nor the adapters may shift the random numbers that the student
        # trains with: then a run without distillation is comparable draw by draw.
        with torch.random.fork_rng(devices=[]):
            teacher = FrozenTeacher.from_config(cfg)
            distiller = build_distiller(cfg, student, teacher)
        return {"student": student, "teacher": teacher, "distiller": distiller}

    @property
    def device(self) -> torch.device:
        """Where the student's parameters are."""
        return next(self.student.parameters()).device

    @property
    def metrics(self) -> dict[str, torch.Tensor]:
        """Detached scalars of the last training step, by the name they are logged under."""
        return {} if self.distiller is None else self.distiller.metrics

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: as for every Detectron2 model; ``image`` is (3, H, W) in [0, 255].

        Returns:
            in training a dict of scalar losses; in evaluation what the student returns.
        """
        if not self.training or self.teacher is None or self.distiller is None or not self._tap:
            return self.student(batched_inputs)

        device = self.device
        # One copy to the device serves both models.
        inputs = [{**x, "image": x["image"].to(device, non_blocking=True)} for x in batched_inputs]
        teacher_features = self.teacher([x["image"] for x in inputs])
        with self._tap as student_features:
            try:
                losses = dict(self.student(inputs))
            finally:
                # Also where the student stops half-way, which it does at features like these.
                self.health = _health(teacher=teacher_features, student=student_features)
        batch = DistillBatch.from_inputs(batched_inputs, device)
        distillation = self.distiller(student_features, teacher_features, batch)
        clash = losses.keys() & distillation.keys()
        if clash:
            raise ValueError(f"The distiller's losses {sorted(clash)} are names of the student's.")
        return {**losses, **distillation}

    def _apply(self, fn: Callable, *args: Any, **kwargs: Any) -> "DistilledDetector":
        super()._apply(fn, *args, **kwargs)
        if self.teacher is not None:
            self.teacher.to(self.device)
        return self


def _health(**features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        f"{whose} features {level}": maps.detach().sum(dtype=torch.float32)
        for whose, by_level in features.items()
        for level, maps in by_level.items()
    }
