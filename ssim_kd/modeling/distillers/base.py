"""Distillers: what makes a loss of the outputs of student and teacher. One is one term."""

import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from detectron2.utils.registry import Registry
from fvcore.common.param_scheduler import ConstantParamScheduler, ParamScheduler
from torch import nn

from ...config_files import near_keys
from ..teacher import FrozenTeacher
from .checks import check_weight
from .schedule import build_schedule

DISTILLER_REGISTRY = Registry("DISTILLER")
DISTILLER_REGISTRY.__doc__ = """
Registry for distillers: called as ``obj(cfg)`` with the config of one term, and expected to return
a :class:`Distiller`.
"""


class DistillBatch:
    """A training batch as distillers see it.

    Attributes:
        image_sizes: (height, width) of each image in pixels, without padding.
        images: as the student is given them, (3, H, W) in [0, 255], on the device.
        device: where the features are.
        iteration: of the training, from 0.
        max_iter: number of iterations of the training.
        teacher: the frozen detector, heads included, or None if no distiller asked for heads. Its
            heads are float32.
        student: the student.
    """

    def __init__(
        self,
        image_sizes: Sequence[tuple[int, int]],
        instances: Sequence[Instances] | None = None,
        *,
        images: Sequence[torch.Tensor] = (),
        device: torch.device | str = "cpu",
        iteration: int = 0,
        max_iter: int = 1,
        teacher: nn.Module | None = None,
        student: nn.Module | None = None,
    ) -> None:
        self.image_sizes = list(image_sizes)
        self.images = list(images)
        self.device = torch.device(device)
        self.iteration, self.max_iter = iteration, max_iter
        self.teacher, self.student = teacher, student
        self._instances = instances

    @classmethod
    def from_inputs(
        cls, batched_inputs: Sequence[Mapping[str, Any]], **kwargs: Any
    ) -> "DistillBatch":
        """Read sizes and ground truth off the inputs of a Detectron2 model."""
        sizes = [(int(x["image"].shape[-2]), int(x["image"].shape[-1])) for x in batched_inputs]
        labelled = all("instances" in x for x in batched_inputs)
        return cls(sizes, [x["instances"] for x in batched_inputs] if labelled else None, **kwargs)

    @cached_property
    def instances(self) -> list[Instances] | None:
        """The ground truth of each image, on the device; None where the data has none."""
        if self._instances is None:
            return None
        return [x.to(self.device) for x in self._instances]

    def ground_truth(self, method: str) -> list[Instances]:
        """:attr:`instances`, for a method that needs them.

        Raises:
            ValueError: the data has none.
        """
        if self.instances is None:
            raise ValueError(
                f"{method} needs the ground truth, but the training images have no 'instances'. "
                "Use a mapper that keeps them, or a method that needs none."
            )
        return self.instances

    def generator(self, *names: str) -> torch.Generator:
        """What a method draws its random numbers with, on the device of the features.

        It depends on the seed of the process, the iteration and the names alone: a resumed training
        draws the same, and the random numbers that the student trains with stay as they are.

        Args:
            names: what tells the generators of a step apart.
        """
        text = " ".join([str(torch.initial_seed()), str(self.iteration), *names])
        return torch.Generator(self.device).manual_seed(zlib.crc32(text.encode()))

    def is_padded(self, height: int, width: int, stride: int) -> bool:
        """Whether any cell of a map lies wholly in the padding of its image."""
        return any(-(-h // stride) < height or -(-w // stride) < width for h, w in self.image_sizes)

    def valid_mask(self, height: int, width: int, stride: int) -> torch.Tensor:
        """Which cells of a map see any pixel of their image.

        Args:
            height, width: size of the map in cells.
            stride: of the map, in input pixels.

        Returns:
            (N, H, W) bool, False for the cells that lie wholly in the padding.
        """
        if not self.is_padded(height, width, stride):
            size = (len(self.image_sizes), height, width)
            return torch.ones(size, dtype=torch.bool, device=self.device)
        sizes = -(-self._sizes_on_device // stride)
        rows = torch.arange(height, device=self.device) < sizes[:, :1]
        columns = torch.arange(width, device=self.device) < sizes[:, 1:]
        return rows[:, :, None] & columns[:, None, :]

    @cached_property
    def _sizes_on_device(self) -> torch.Tensor:
        """(N, 2) int64. Copied once a batch, from pinned memory so that the host need not wait."""
        sizes = torch.tensor(self.image_sizes)
        if self.device.type == "cuda":
            sizes = sizes.pin_memory()
        return sizes.to(self.device, non_blocking=True)


class Distiller(nn.Module):
    """One term of the distillation loss.

    A method derives from this class, or from :class:`PyramidDistiller` if it compares maps level
    by level. :class:`DistilledDetector` calls :meth:`bind` once, then :meth:`forward` in every
    training step. Modules that are attributes of the distiller are trained, synchronised by DDP and
    kept in the checkpoints of the training, and are no part of the student.

    Attributes:
        student_taps, teacher_taps: levels or submodule paths whose outputs it is given, see
            :class:`Tap`. Set them in ``bind`` at the latest.
        needs_teacher_heads: whether it calls the teacher's heads (``batch.teacher``).
        scalar_weights: weight within the loss of each scalar that it returns, 1 if absent.
    """

    student_taps: Sequence[str] = ()
    teacher_taps: Sequence[str] = ()
    needs_teacher_heads: bool = False
    scalar_weights: Mapping[str, float] = {}

    def __init__(self, *, name: str, weight: float | ParamScheduler = 1.0) -> None:
        """
        Args:
            name: under which its scalars are logged: ``distill/{name}_{scalar}``.
            weight: lambda, >= 0; a ``ParamScheduler`` is a function of iteration / max_iter.

        Raises:
            ValueError: a weight that is negative or not finite.
        """
        super().__init__()
        self.name = name
        if not isinstance(weight, ParamScheduler):
            weight = ConstantParamScheduler(check_weight("MODEL.DISTILL.LOSS_WEIGHT", weight))
        self.weight = weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments that every method takes from ``MODEL.DISTILL``."""
        return {"weight": build_schedule(cfg)}

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
        raise NotImplementedError(f"{type(self).__name__} does not define forward.")

    def param_groups(self, base_lr: float) -> list[dict[str, Any]]:
        """Optimizer groups of its own modules.

        A group has "params", and may have "lr", "weight_decay" and other options of the optimizer;
        "optimizer" ("AdamW") for one of its own class; "schedule", a ``ParamScheduler`` that
        multiplies "lr" instead of the run's; and "clip_norm". See ``ssim_kd.engine.optimizer``.

        Args:
            base_lr: SOLVER.BASE_LR.

        Returns:
            [] to train with the student's settings.
        """
        return []


def build_distillers(cfg: CfgNode) -> list[Distiller]:
    """The terms of ``MODEL.DISTILL.TERMS``, or the single one of ``MODEL.DISTILL.NAME``.

    Raises:
        ValueError: an unknown distiller or key, or a value out of its range.
    """
    terms = [list(term) for term in cfg.MODEL.DISTILL.TERMS] or [[cfg.MODEL.DISTILL.NAME]]
    distillers: list[Distiller] = []
    for term in terms:
        distiller = _build_distiller(cfg, term)
        names = [d.name for d in distillers]
        if distiller.name in names:
            number = 1 + sum(
                n == distiller.name or n.startswith(f"{distiller.name}_") for n in names
            )
            distiller.name = f"{distiller.name}_{number}"
        distillers.append(distiller)
    return distillers


def _build_distiller(cfg: CfgNode, term: list[Any]) -> Distiller:
    key = "MODEL.DISTILL.TERMS" if cfg.MODEL.DISTILL.TERMS else "MODEL.DISTILL.NAME"
    name, overrides = (term[0], term[1:]) if term else ("", [])
    if name not in DISTILLER_REGISTRY:
        raise ValueError(f"{key}: {name!r} is no distiller; {_expected(name, _registered())}")
    if overrides:
        cfg = cfg.clone()
        cfg.defrost()
        _override(cfg, term)
    return DISTILLER_REGISTRY.get(name)(cfg)


def _registered() -> list[str]:
    return sorted(name for name, _ in DISTILLER_REGISTRY)


def _override(cfg: CfgNode, term: list[Any]) -> None:
    """Apply ["Name", KEY, VALUE, ...] to ``MODEL.DISTILL``."""
    keys, values = term[1::2], term[2::2]
    if len(keys) != len(values):
        raise ValueError(f"MODEL.DISTILL.TERMS: {term} is no name with KEY, VALUE pairs behind it.")
    for key, value in zip(keys, values, strict=True):
        node, known = cfg.MODEL.DISTILL, True
        for part in str(key).split("."):
            known = isinstance(node, CfgNode) and part in node
            if not known:
                break
            node = node[part]
        if not known or isinstance(node, CfgNode) or key in ("TERMS", "NAME", "ENABLED"):
            raise ValueError(
                f"MODEL.DISTILL.TERMS: {key!r} in {term} is no key of a distiller; "
                f"{_expected(str(key), _leaves(cfg.MODEL.DISTILL))}"
            )
        try:
            cfg.merge_from_list([f"MODEL.DISTILL.{key}", value])
        except (ValueError, AssertionError) as error:
            raise ValueError(f"MODEL.DISTILL.TERMS: {key} in {term}: {error}") from error


def _leaves(node: CfgNode, prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in node.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else [prefix + key]
    return found


def _expected(name: object, known: list[str]) -> str:
    near = near_keys(str(name), known, most=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"expected one of {known}."
