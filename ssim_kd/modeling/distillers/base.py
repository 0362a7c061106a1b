"""Distillers: what makes a loss of the outputs of student and teacher. One is one term."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils.registry import Registry
from fvcore.common.param_scheduler import ConstantParamScheduler, ParamScheduler
from torch import nn

from ...ops.options import check_number
from ..teacher import FrozenTeacher
from .balance import AUTO, GradientBalance
from .batch import DistillBatch
from .schedule import build_schedule

DISTILLER_REGISTRY = Registry("DISTILLER")
DISTILLER_REGISTRY.__doc__ = """
Registry for distillers: called as ``obj(cfg)`` with the config of one term, and expected to return
a :class:`Distiller`.
"""


def part_keys(node: str, *parts: str) -> dict[str, str]:
    """Entries of :attr:`Distiller.keys` for ``part_weights``: the key of "fg" is FG_WEIGHT."""
    return {f"part_weights.{part}": f"{node}.{part.upper()}_WEIGHT" for part in parts}


class Distiller(nn.Module):
    """One term of the distillation loss.

    A method derives from this class, or from :class:`PyramidDistiller` if it compares maps level
    by level. :class:`DistilledDetector` calls :meth:`resolve` and :meth:`bind` once, then
    :meth:`forward` in every training step. Modules that are attributes of the distiller are
    trained, synchronised by DDP and kept in the checkpoints of the training. They are not part of
    the student.

    Attributes:
        keys: the config key, below ``MODEL.DISTILL``, of each argument that has one:
            ``{"eps": "PKD.EPS"}``. Those of the base classes are added.
        defaults: the method's own value of each argument that may be None.
        dense_defaults: those that differ for dense detectors (RetinaNet, FCOS).
        student_taps, teacher_taps: levels or submodule paths whose outputs it is given, see
            :class:`Tap`. Set them in ``bind`` at the latest.
        needs_teacher_heads: whether it calls the teacher's heads (``batch.teacher``).
        scalar_weights: weight within the loss of each scalar that it returns, 1 if absent.
        weight: lambda as a function of iteration / max_iter; of "auto", a factor of it.
        balance: what finds the weight "auto", or None.
        own: the arguments that were None, with the method's own values.
    """

    keys: Mapping[str, str] = {"weight": "LOSS_WEIGHT", "share": "GRADIENT_SHARE"}
    defaults: Mapping[str, Any] = {"weight": 1.0}
    dense_defaults: Mapping[str, Any] = {}
    student_taps: Sequence[str] = ()
    teacher_taps: Sequence[str] = ()
    needs_teacher_heads: bool = False
    weight: ParamScheduler

    def __init__(
        self,
        *,
        name: str,
        weight: float | ParamScheduler | str | None = None,
        share: float = 10.0,
        schedule: Callable[[float], ParamScheduler] = ConstantParamScheduler,
        part_weights: Mapping[str, float | None] | None = None,
    ) -> None:
        """
        Args:
            name: under which its scalars are logged: ``distill/{name}_{scalar}``.
            weight: lambda, >= 0; a ``ParamScheduler`` is a function of iteration / max_iter; None
                is the method's own; "auto" is found in training, see :class:`GradientBalance`.
            share: of "auto": how many times as large as that of the detection losses the gradient
                is, >= 0. ``schedule`` changes it.
            schedule: makes a function of iteration / max_iter out of a number.
            part_weights: of the parts of the loss, >= 0; the method's own of those that are absent
                or None.

        Raises:
            ValueError: a weight that is negative or not finite.
        """
        super().__init__()
        self.name = name
        self.schedule = schedule
        self.balance = GradientBalance(share) if weight == AUTO else None
        self.base_weight = weight
        if weight is not None:
            self._set_weight(weight)
        self.part_weights: dict[str, Any] = dict(part_weights or {})
        for part, value in self.part_weights.items():
            check_number(f"part_weights.{part}", value, least=0, optional=True)
        self.scalar_weights: dict[str, float] = {}
        self.own: dict[str, Any] = {}
        self.key_names: Mapping[str, str] = {}

    def _set_weight(self, weight: float | ParamScheduler | str) -> None:
        self.base_weight = weight
        if not isinstance(weight, ParamScheduler):
            if isinstance(weight, str) and weight != AUTO:
                raise ValueError(f"weight is {weight!r}; expected a number >= 0, or {AUTO!r}.")
            factor = 1.0 if weight == AUTO else check_number("weight", weight, least=0)
            weight = self.schedule(factor)
        self.weight = weight

    @classmethod
    def all_keys(cls) -> dict[str, str]:
        """:attr:`keys`, with those of the base classes."""
        return _merged(cls, "keys")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments of the config: each by its key of :attr:`keys`, and the schedule."""
        found: dict[str, Any] = {"schedule": functools.partial(build_schedule, cfg)}
        for argument, key in cls.all_keys().items():
            value: Any = cfg.MODEL.DISTILL
            for part in key.split("."):
                value = value[part]
            name, _, entry = argument.partition(".")
            if entry:
                found.setdefault(name, {})[entry] = value
            else:
                found[name] = value
        return found

    def own_values(self, student: nn.Module | None) -> dict[str, Any]:
        """The method's own values of the arguments that may be None.

        Args:
            student: by whose kind they may differ; None: those of R-CNN.
        """
        found = _merged(type(self), "defaults")
        if isinstance(student, DenseDetector):
            found |= _merged(type(self), "dense_defaults")
        return found

    def resolve(self, student: nn.Module | None = None) -> None:
        """Give the arguments that are None the method's own values; a second call does nothing.

        Args:
            student: see :meth:`own_values`.
        """
        for name, value in self.own_values(student).items():
            if name == "weight":
                if self.base_weight is None:
                    self._set_weight(value)
                    self.own[name] = value
            elif isinstance(value, Mapping):
                given = {k: v for k, v in getattr(self, name).items() if v is not None}
                self.own |= {f"{name}.{k}": v for k, v in value.items() if k not in given}
                setattr(self, name, {**value, **given})
            elif getattr(self, name) is None:
                setattr(self, name, value)
                self.own[name] = value
        self.scalar_weights = dict(self.part_weights)

    def bind(self, student: nn.Module, teacher: FrozenTeacher) -> None:
        """Check that the method can serve this pair, and build what depends on it.

        Args:
            student: the detector that is trained.
            teacher: shapes and structure; its weights may not be loaded yet, so keep no reference
                to its modules.

        Raises:
            ValueError: it cannot; the message says why.
        """

    def forward(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: DistillBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            student, teacher: the tapped outputs by name; those of the teacher have no gradient.
            batch: sizes, ground truth, teacher.

        Returns:
            the loss, a scalar without ``weight``; and detached scalars to log.
        """
        return self.weigh(self.parts(student, teacher, batch))

    def parts(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: DistillBatch
    ) -> dict[str, torch.Tensor]:
        """The unweighted parts of the loss, scalars, by their names; arguments as forward's."""
        raise NotImplementedError(f"{type(self).__name__} defines neither forward nor parts.")

    def weigh(
        self, parts: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The sum of the parts by :attr:`scalar_weights`, and the parts, detached."""
        total = sum(self.scalar_weights.get(name, 1.0) * part for name, part in parts.items())
        return torch.as_tensor(total), {name: part.detach() for name, part in parts.items()}

    def param_groups(self, base_lr: float) -> list[dict[str, Any]]:
        """Optimizer groups of the method's modules.

        A group has "params", and may have "lr", "weight_decay" and other options of the optimizer;
        "optimizer" ("AdamW") for one of another class; "schedule", a ``ParamScheduler`` that
        multiplies "lr" instead of the run's; and "clip_norm". See ``ssim_kd.engine.optimizer``.

        Args:
            base_lr: SOLVER.BASE_LR.

        Returns:
            [] to train with the student's settings.
        """
        return []


def _merged(cls: type, attribute: str) -> dict[str, Any]:
    """A mapping of a class with those of its bases."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        found |= base.__dict__.get(attribute, {})
    return found
