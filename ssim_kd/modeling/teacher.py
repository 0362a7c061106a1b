"""The teacher: a detector of any kind, frozen, of which the feature path alone is kept."""

import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from torch import nn

from ..checkpoint import Weights, load_strictly, read_weights
from .folding import fold_batch_norms
from .taps import FeatureTap, tappable_levels
from .teacher_config import teacher_config

logger = logging.getLogger(__name__)


def load_teacher(
    config: CfgNode, *, name: str, feature_path: str = ""
) -> tuple[nn.Module, Weights]:
    """Build the whole teacher and load its weights.

    Args:
        config: from :func:`teacher_config`.
        name: its CONFIG_FILE, for messages.
        feature_path: prefix of the keys that must fit; "" for all.

    Raises:
        ValueError: it cannot be built, or what :func:`load_strictly` raises.
    """
    weights = read_weights(config.MODEL.WEIGHTS, key="MODEL.DISTILL.TEACHER.WEIGHTS")
    try:
        model = build_model(config)
    except Exception as error:
        raise ValueError(
            f"The teacher cannot be built from MODEL.DISTILL.TEACHER.CONFIG_FILE {name!r} with "
            f"its OPTS: {error}"
        ) from error
    unfit = load_strictly(model, weights, feature_path=feature_path)
    if unfit:
        logger.warning(
            "The teacher's heads do not fit its config (%d keys, e.g. %s). Its features, which "
            "alone are used, do; --eval-teacher would refuse it.",
            len(unfit),
            unfit[0],
        )
    return model, weights


def _dtype(cfg: CfgNode) -> torch.dtype:
    """The precision of ``TEACHER.PRECISION``.

    Raises:
        ValueError: an unknown one.
    """
    name = cfg.MODEL.DISTILL.TEACHER.PRECISION
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    dtypes = {
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "auto": torch.float32,
    }
    if name not in dtypes:
        raise ValueError(
            f"MODEL.DISTILL.TEACHER.PRECISION is {name!r}; expected one of {list(dtypes)}."
        )
    if name == "auto" and cfg.SOLVER.AMP.ENABLED:
        return torch.float16 if on_gpu else torch.bfloat16
    return dtypes[name]


class FrozenTeacher:
    """The feature path of a detector: preprocessing and backbone, never trained.

    Deliberately no ``nn.Module``: see :class:`DistilledDetector`. Every module in it is in eval
    mode and no parameter asks for a gradient. Heads are not kept: they cost memory and no method
    needs them.
    """

    def __init__(
        self,
        model: Any,
        *,
        input_format: str = "BGR",
        student_format: str = "BGR",
        dtype: torch.dtype = torch.float32,
        fold_bn: bool = True,
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        """
        Args:
            model: a detector with ``backbone``, ``pixel_mean`` and ``pixel_std``, weights loaded.
            input_format: INPUT.FORMAT that the teacher was trained on.
            student_format: INPUT.FORMAT of the images it will be given; the same, or of BGR and
                RGB the other.
            dtype: of its weights and feature maps.
            fold_bn: whether to fold batch norms into the convolutions before them.
            channels_last: memory format of its maps.
            compiled: whether to ``torch.compile`` it; levels below an FPN cannot be tapped then.
        """
        for name in ("backbone", "pixel_mean", "pixel_std"):
            if not hasattr(model, name):
                raise ValueError(
                    f"The teacher {type(model).__name__} has no {name!r}; expected a detector "
                    "like GeneralizedRCNN or RetinaNet."
                )
        self.backbone = model.backbone.requires_grad_(False).eval()
        self.pixel_mean = model.pixel_mean.detach()
        self.pixel_std = model.pixel_std.detach()
        #: SHA-256 of the weights' file, "" where there is none.
        self.sha256 = ""
        if input_format != student_format and {input_format, student_format} != {"BGR", "RGB"}:
            raise ValueError(
                f"INPUT.FORMAT is {student_format!r}, but the teacher's is {input_format!r}; "
                "expected the same, or BGR and RGB, between which images are converted."
            )
        self.swap_channels = input_format != student_format
        self.dtype = dtype
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if fold_bn:
            fold_batch_norms(self.backbone)
        self.backbone.to(dtype=dtype, memory_format=self._memory_format)
        self._compiled = torch.compile(self.backbone) if compiled else None
        self._levels: list[str] = []
        self._tap: FeatureTap | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "FrozenTeacher":
        """Build the teacher of ``MODEL.DISTILL.TEACHER`` on the CPU and load its weights strictly.

        Args:
            cfg: the student's config.

        Raises:
            ValueError: what :func:`teacher_config` and :func:`load_teacher` raise.
        """
        config = teacher_config(cfg)
        node = cfg.MODEL.DISTILL.TEACHER
        model, weights = load_teacher(config, name=node.CONFIG_FILE, feature_path="backbone.")
        teacher = cls(
            model,
            input_format=config.INPUT.FORMAT,
            student_format=cfg.INPUT.FORMAT,
            dtype=_dtype(cfg),
            fold_bn=node.FOLD_BN,
            channels_last=node.CHANNELS_LAST,
            compiled=node.COMPILE,
        )
        teacher.sha256 = weights.sha256
        logger.info(
            "Teacher: %s, %.1fM parameters on its feature path, weights %s (sha256 %s)",
            config.MODEL.META_ARCHITECTURE,
            sum(p.numel() for p in teacher.backbone.parameters()) / 1e6,
            weights.path,
            weights.sha256[:12],
        )
        return teacher

    @property
    def levels(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every level that can be tapped."""
        return tappable_levels(self)

    def tap(self, levels: list[str]) -> None:
        """Choose the levels that a call returns.

        Raises:
            ValueError: a level below the FPN of a compiled teacher.
        """
        inner = [level for level in levels if level not in self.backbone.output_shape()]
        if inner and self._compiled is not None:
            raise ValueError(
                f"The levels {inner} (MODEL.DISTILL.IN_FEATURES, or what both models share where "
                "that is empty) are not shown by a compiled teacher: set "
                "MODEL.DISTILL.TEACHER.COMPILE to False."
            )
        self._levels = levels
        self._tap = FeatureTap(self, levels)

    def to(self, device: torch.device) -> "FrozenTeacher":
        """Move the teacher; its dtype stays its own."""
        self.backbone.to(device)
        self.pixel_mean = self.pixel_mean.to(device)
        self.pixel_std = self.pixel_std.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Args:
            images: (3, H, W) each, in [0, 255], in the student's channel order, on the teacher's
                device.

        Returns:
            the tapped maps (N, C, H, W) by level.
        """
        if self._tap is None:
            raise RuntimeError("No level of the teacher is tapped: call tap() first.")
        batch = self._preprocess(images)
        # The teacher's precision is its own, whatever the student trains in.
        with torch.autocast(batch.device.type, enabled=False):
            if self._compiled is not None:
                outputs = self._compiled(batch)
                return {level: outputs[level] for level in self._levels}
            with self._tap as features:
                self.backbone(batch)
        return features

    def _preprocess(self, images: list[torch.Tensor]) -> torch.Tensor:
        if self.swap_channels:
            images = [image.flip(0) for image in images]
        images = [(image - self.pixel_mean) / self.pixel_std for image in images]
        # 0.6 knows size_divisibility alone; main adds constraints such as ViT's square padding.
        constraints = getattr(self.backbone, "padding_constraints", None)
        options = {"padding_constraints": constraints} if constraints else {}
        padded = ImageList.from_tensors(images, self.backbone.size_divisibility, **options)
        return padded.tensor.to(self.dtype, memory_format=self._memory_format)
