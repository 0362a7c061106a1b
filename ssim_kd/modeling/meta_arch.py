"""The meta-architecture: a stock student, a frozen teacher, and what is learned between them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.events import get_event_storage
from torch import nn

from ..config import student_config
from ..logs import share_log
from .distillers import DistillBatch, Distiller, bind_distillers, build_distillers
from .distillers.balance import measure_gradients
from .inherit import check_inherited, copy_inherited, inherit_in_training, inherited_keys
from .loaded_teacher import LoadedTeacher
from .map_rank import MapRanks
from .plain_names import LikeStudent, keep_plain_names
from .taps import Tap, check_features, feature_sums
from .teacher import FrozenTeacher
from .teacher_files import TeacherNotFoundError

logger = logging.getLogger(__name__)


@META_ARCH_REGISTRY.register()
class DistilledDetector(LikeStudent):
    """A detector that learns from its data and from a frozen teacher.

    In training, its losses are the student's own and "loss_distill". In evaluation it is the
    student. To every trainer, checkpointer and script it looks like the student:

    - its ``state_dict()`` has the student's plain keys, and the distillers' under "distillers.";
      so have ``named_modules()`` and ``named_parameters()``;
    - attributes that it lacks are the student's, and ``isinstance`` takes it for the student's
      class as well, so that ``GeneralizedRCNNWithTTA`` and the like accept it.

    The student is whatever ``build_model`` makes of its config, untouched. The teacher is a plain
    object and no module: it is in no ``state_dict()``, ``parameters()``, ``modules()`` or DDP, and
    ``train()`` does not reach it; it follows the model's device. Its weights are loaded at the
    first training step, or by :meth:`load_teacher`; evaluation never loads them.

        model = DistilledDetector(
            student=build_model(cfg),
            teacher=FrozenTeacher.load_from("COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"),
            distillers=[SSIMDistiller(weight=4.0)],
            max_iter=90000,
        )

    Attributes:
        student: the detector that is trained.
        teacher: what teaches, as it was found; None: this is the plain student.
        loaded_teacher: with its weights; None before the first step or :meth:`load_teacher`.
        distillers: the terms of the loss by name.
        metrics: detached scalars of the last training step, by the name they are logged under.
        health: one scalar a level and model, finite if its features are; of the last step.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: FrozenTeacher | nn.Module | None = None,
        distillers: Sequence[Distiller] = (),
        max_iter: int = 1,
        log_period: int = 20,
        init_from_teacher: Sequence[str] = (),
        missing_teacher: Exception | None = None,
    ) -> None:
        """
        Args:
            student: a detector.
            teacher: a detector, frozen in place, or a :class:`FrozenTeacher`.
            distillers: the terms; they are bound to student and teacher here.
            max_iter: iterations of the training, for the schedules of the terms.
            log_period: iterations after which scalars are put into the ``EventStorage``; 0: never.
            init_from_teacher: "fpn", "heads": parts of the student that are copied from the teacher
                before the first step of a training that begins at iteration 0.
            missing_teacher: why the teacher is missing; raised in training.

        Raises:
            ValueError: a teacher without distillers or the reverse, two terms of one name, or a
                pair that a distiller cannot serve.
        """
        super().__init__()
        share_log()
        if teacher is not None and not isinstance(teacher, FrozenTeacher):
            teacher = FrozenTeacher(teacher)
        if (teacher is None) != (not distillers):
            raise ValueError("DistilledDetector needs a teacher and distillers, or neither.")
        names = [d.name for d in distillers]
        if len(set(names)) < len(names):
            raise ValueError(f"The distillers are named {names}; expected another name for each.")
        self.student = student
        self.teacher = teacher
        self.max_iter, self.log_period = max_iter, log_period
        self.missing_teacher = missing_teacher
        self.metrics: dict[str, torch.Tensor] = {}
        self.health: dict[str, torch.Tensor] = {}
        self._inherits = list(init_from_teacher)
        self._ranks = MapRanks()
        self.loaded_teacher: LoadedTeacher | None = None
        if teacher is not None:
            self._bind(teacher, distillers)
        self.distillers = nn.ModuleDict({d.name: d for d in distillers})
        keep_plain_names(self)
        self.register_state_dict_pre_hook(inherit_in_training)

    def _bind(self, teacher: FrozenTeacher, distillers: Sequence[Distiller]) -> None:
        mean = getattr(self.student, "pixel_mean", None)
        if mean is not None and mean.numel() != teacher.model.pixel_mean.numel():
            raise ValueError(
                f"MODEL.PIXEL_MEAN has {mean.numel()} channels, but the teacher's has "
                f"{teacher.model.pixel_mean.numel()}: both see the same images. Expected a teacher "
                "of as many channels."
            )
        image_format = getattr(self.student, "input_format", None) or "BGR"
        # Adapters may not shift the random numbers that the student trains with: then a run without
        # distillation is comparable draw by draw.
        with torch.random.fork_rng(devices=[]):
            bind_distillers(distillers, self.student, teacher)
        if self._inherits:
            check_inherited(self.student, teacher.model, self._inherits)
        balances: list[Any] = [d.balance for d in distillers if d.balance is not None]
        taps = [n for part in (*distillers, *balances) for n in part.student_taps]
        self._student_tap = Tap(self.student, taps)
        self._teacher_use: dict[str, Any] = {
            "names": [n for d in distillers for n in d.teacher_taps],
            "heads": any(d.needs_teacher_heads for d in distillers),
            "keep": inherited_keys(self.student, self._inherits),
            "image_format": image_format,
        }
        teacher.check(self._teacher_use["names"], image_format)

    def load_teacher(self) -> LoadedTeacher | None:
        """The teacher with its weights, which are loaded at the first call.

        Returns:
            None without a teacher, or if nothing of it is used.

        Raises:
            ValueError: what :meth:`FrozenTeacher.load` raises.
        """
        if self.loaded_teacher is None and self.teacher is not None:
            use = self._teacher_use
            if use["names"] or use["heads"] or use["keep"]:
                self.loaded_teacher = self.teacher.load(**use).to(self.device)
        return self.loaded_teacher

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the student, the teacher without its weights, and the distillers."""
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
        found: dict[str, Any] = {"student": student, "max_iter": cfg.SOLVER.MAX_ITER}
        if not cfg.MODEL.DISTILL.ENABLED:
            return found
        with torch.random.fork_rng(devices=[]):
            distillers = build_distillers(cfg)
            try:
                teacher = FrozenTeacher.from_config(cfg)
            except TeacherNotFoundError as error:
                # To evaluate the student it is not needed.
                return {**found, "missing_teacher": error}
        inherits = list(cfg.MODEL.DISTILL.INIT_FROM_TEACHER)
        found |= {"teacher": teacher, "distillers": distillers}
        return {**found, "init_from_teacher": inherits}

    @property
    def device(self) -> torch.device:
        """The device of the student's parameters."""
        return next(self.student.parameters()).device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: as for every Detectron2 model; ``image`` is (3, H, W) in [0, 255].

        Returns:
            in training a dict of scalar losses; in evaluation what the student returns.
        """
        if not self.training:
            return self.student(batched_inputs)
        if self.missing_teacher is not None:
            raise self.missing_teacher
        if self.teacher is None:
            return self.student(batched_inputs)

        device, iteration = self.device, get_event_storage().iter
        self.inherit(iteration)
        # One copy to the device serves both models.
        inputs = [{**x, "image": x["image"].to(device, non_blocking=True)} for x in batched_inputs]
        teacher = self.load_teacher()
        theirs = {} if teacher is None else teacher([x["image"] for x in inputs])
        get_event_storage().put_scalars(**self._ranks.add(theirs))
        with self._student_tap as ours:
            try:
                losses = dict(self.student(inputs))
            finally:
                # Set even if the student raises: Detectron2 stops at non-finite proposals.
                self.health = feature_sums(teacher=theirs, student=ours)
        batch = DistillBatch.from_inputs(
            batched_inputs,
            images=[x["image"] for x in inputs],
            device=device,
            iteration=iteration,
            max_iter=self.max_iter,
            teacher=None if teacher is None else teacher.detector,
            student=self.student,
        )
        if "loss_distill" in losses:
            raise ValueError("The student itself has a loss named 'loss_distill'.")
        check_features(self.student, list(self.distillers.values()), ours)
        return {**losses, "loss_distill": self._distill(losses, ours, theirs, batch)}

    def _distill(
        self,
        detection: Mapping[str, torch.Tensor],
        ours: Mapping[str, Any],
        theirs: Mapping[str, Any],
        batch: DistillBatch,
    ) -> torch.Tensor:
        total: Any = 0.0
        self.metrics = {}
        # Clamp: a hook may train past max_iter.
        where = min(batch.iteration / self.max_iter, 1.0 - 1e-9)
        distillers: Any = self.distillers
        found = {
            name: distiller(
                {key: ours[key] for key in distiller.student_taps},
                {key: theirs[key] for key in distiller.teacher_taps},
                batch,
            )
            for name, distiller in distillers.items()
        }
        measure_gradients(
            [(distillers[name].balance, loss) for name, (loss, _) in found.items()],
            detection,
            ours,
            batch.iteration,
        )
        for name, (loss, scalars) in found.items():
            distiller = distillers[name]
            weight = distiller.weight(where)
            if distiller.balance is not None:
                weight = weight * distiller.balance.weight()
                self.metrics[f"distill/{name}_weight"] = weight
                self.metrics[f"distill/{name}_share"] = distiller.balance.measured_share.clone()
            total = total + weight * loss
            for key, value in scalars.items():
                share = weight * distiller.scalar_weights.get(key, 1.0)
                self.metrics[f"distill/{name}_{key}"] = value
                self.metrics[f"distill/{name}_{key}_weighted"] = value * share
            if len(self.distillers) > 1:
                self.metrics[f"distill/{name}_weighted"] = weight * loss.detach()
        if self.log_period and (batch.iteration + 1) % self.log_period == 0:
            get_event_storage().put_scalars(**{k: float(v) for k, v in self.metrics.items()})
        return total

    def inherit(self, iteration: int = 0) -> None:
        """Copy from the teacher what the student begins with: INIT_FROM_TEACHER.

        A training calls it when the start weights are loaded, before hooks see the model. It is
        done once, by the first step at the latest.

        Args:
            iteration: that the training begins at; a resumed one, > 0, has copied already.
        """
        parts, self._inherits = self._inherits, []
        teacher = self.load_teacher() if parts else None
        if teacher is not None:
            if iteration == 0:
                copy_inherited(self.student, teacher.kept, parts)
            teacher.kept.clear()

    def param_groups(self, base_lr: float) -> list[dict[str, Any]]:
        """The optimizer groups that distillers ask for; see :meth:`Distiller.param_groups`."""
        distillers: Any = self.distillers.values()
        return [g for d in distillers for g in d.param_groups(base_lr)]

    def _apply(self, fn: Callable, *args: Any, **kwargs: Any) -> "DistilledDetector":
        super()._apply(fn, *args, **kwargs)
        if self.loaded_teacher is not None:
            self.loaded_teacher.to(self.device)
        return self
