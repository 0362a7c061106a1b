"""The teacher: a detector of any kind, frozen, hidden from the model that learns from it."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.structures import ImageList
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .taps import Tap, tappable_levels
from .teacher_config import TeacherSource, source_of, teacher_source
from .teacher_loading import build_structure, load_detector

logger = logging.getLogger(__name__)

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class FrozenTeacher:
    """A frozen detector of which the feature path runs: preprocessing and backbone.

    It is not an ``nn.Module``, so that the model that holds it shows it in no ``state_dict()``,
    ``parameters()``, ``modules()`` or DDP, and ``train()`` does not reach it. Every module in it is
    in eval mode, and no parameter asks for a gradient. Its heads are kept only if a distiller calls
    them.

        teacher = FrozenTeacher(detector)                                  # a Module, as it is
        teacher = FrozenTeacher.load_from("COCO-Detection/retinanet_R_101_FPN_3x.yaml")

    Attributes:
        model: the whole detector, or None once it is known that no distiller calls its heads.
        backbone, pixel_mean, pixel_std: the feature path.
        sha256: of the weights' file; "" before it is loaded, or without one.
        kept: tensors of the detector by name, for INIT_FROM_TEACHER; see :meth:`keep`.
    """

    def __init__(
        self,
        model: Any,
        *,
        input_format: str = "",
        image_format: str = "",
        dtype: torch.dtype = torch.float32,
        fold_bn: bool = False,
        channels_last: bool = False,
        compiled: bool = False,
        load: Callable[[], tuple[Any, str]] | None = None,
    ) -> None:
        """
        Args:
            model: a detector with ``backbone``, ``pixel_mean`` and ``pixel_std``; it is frozen in
                place. With ``load``, only its shapes are used.
            input_format: channel order that the teacher was trained on; "" for the model's
                ``input_format``, or BGR if it has none.
            image_format: channel order of the images it is given; the same, or of BGR and RGB the
                other. "" is set by :class:`DistilledDetector` to the student's.
            dtype: of the backbone's weights and maps. Heads stay in float32.
            fold_bn: whether to fold batch norms into the convolutions before them, in place.
            channels_last: memory format of its maps.
            compiled: whether to ``torch.compile`` the backbone; then only its outputs are tappable.
            load: returns the detector with its weights, and their SHA-256; called at the first use.

        Raises:
            ValueError: a model without one of these attributes.
        """
        for name in ("backbone", "pixel_mean", "pixel_std"):
            if not hasattr(model, name):
                raise ValueError(
                    f"The teacher {type(model).__name__} has no {name!r}; expected a detector "
                    "like GeneralizedRCNN or RetinaNet."
                )
        self.input_format = input_format or getattr(model, "input_format", None) or "BGR"
        self.image_format = image_format
        self.dtype = dtype
        self.sha256 = ""
        self.kept: dict[str, torch.Tensor] = {}
        self._kept_prefixes: list[str] = []
        self._fold_bn, self._compile = fold_bn, compiled
        self._channels_last = channels_last
        self._device = torch.device("cpu")
        self._load = load
        self._names: list[str] = []
        self._heads = True
        self._tap: Tap | None = None
        self._compiled: Any = None
        self.pixel_mean: torch.Tensor
        self.pixel_std: torch.Tensor
        self._install(model)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "FrozenTeacher":
        """The teacher of ``MODEL.DISTILL.TEACHER``. Its weights are loaded at the first use.

        Args:
            cfg: the student's config.

        Raises:
            ValueError: what :func:`teacher_source` raises, or a teacher that cannot be built.
        """
        node = cfg.MODEL.DISTILL.TEACHER
        return cls._from_source(
            teacher_source(cfg),
            image_format=cfg.INPUT.FORMAT,
            dtype=teacher_dtype(cfg),
            fold_bn=node.FOLD_BN,
            channels_last=node.CHANNELS_LAST,
            compiled=node.COMPILE,
        )

    @classmethod
    def load_from(
        cls, name: str, weights: str = "", opts: Sequence[Any] = (), **options: Any
    ) -> "FrozenTeacher":
        """A teacher by its name, with its weights; also for LazyConfigs.

        Args:
            name, weights: see :func:`find_teacher`.
            opts: overrides of its config: KEY, VALUE, ... for a YAML, "key=value" for a LazyConfig.
            options: of the constructor.

        Raises:
            ValueError: as :meth:`from_config`.
        """
        return cls._from_source(source_of(name, weights, opts), **{"fold_bn": True, **options})

    @classmethod
    def _from_source(cls, source: TeacherSource, **options: Any) -> "FrozenTeacher":
        def load() -> tuple[nn.Module, str]:
            model: Any
            model, weights = load_detector(source, strict_prefix=teacher.strict_prefix)
            logger.info(
                "Teacher: %s, %.1fM parameters on its feature path, weights %s (sha256 %s)",
                type(model).__name__,
                sum(p.numel() for p in model.backbone.parameters()) / 1e6,
                *(weights.path, weights.sha256[:12]),
            )
            return model, weights.sha256

        teacher = cls(
            build_structure(source), input_format=source.input_format, load=load, **options
        )
        return teacher

    @property
    def _memory_format(self) -> torch.memory_format:
        # No attribute: torch.save takes no memory format.
        return torch.channels_last if self._channels_last else torch.contiguous_format

    @property
    def strict_prefix(self) -> str:
        """Prefix of the keys of a weights file that must fit: what is used of the detector."""
        return "" if self._heads or self._kept_prefixes else "backbone."

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._load is None

    @property
    def levels(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every level that can be tapped."""
        return tappable_levels(self)

    def tap(self, names: Sequence[str], *, heads: bool = False) -> None:
        """Choose what a call returns.

        Args:
            names: levels, or paths of submodules of the backbone ("backbone.bottom_up.res5").
            heads: whether distillers call the detector's heads: ``model`` is kept for them.

        Raises:
            ValueError: a name that cannot be tapped.
        """
        beyond = [n for n in names if n not in self.levels and not n.startswith("backbone.")]
        if beyond:
            raise ValueError(
                f"The teacher's {beyond} cannot be tapped: only its backbone runs. A distiller "
                "calls heads itself, by batch.teacher."
            )
        outputs = self.backbone.output_shape()
        inner = [name for name in names if name not in outputs]
        if inner and self._compile:
            raise ValueError(
                f"{inner} of a compiled teacher cannot be tapped (MODEL.DISTILL.IN_FEATURES, or "
                "what both models share where that is empty): set MODEL.DISTILL.TEACHER.COMPILE to "
                "False."
            )
        self._names = list(dict.fromkeys(names))
        self._heads = heads
        self._retap()

    def keep(self, prefixes: Sequence[str]) -> None:
        """Have tensors of the detector kept as they are loaded, before folding, in ``kept``."""
        self._kept_prefixes = list(prefixes)
        if self.loaded:
            self._keep_from(self.model)

    def to(self, device: torch.device) -> "FrozenTeacher":
        """Move the teacher; its dtype stays its own."""
        self._device = torch.device(device)
        if self.loaded:
            for module in (self.backbone, self.model):
                if module is not None:
                    module.to(self._device)
            self.pixel_mean = self.pixel_mean.to(self._device)
            self.pixel_std = self.pixel_std.to(self._device)
        return self

    def load(self) -> None:
        """Load the weights now, if that has not happened and anything of the teacher is used.

        Raises:
            ValueError: what :func:`load_detector` raises.
        """
        if self._load is None or not (self._names or self._heads or self._kept_prefixes):
            return
        model, self.sha256 = self._load()
        self._load = None
        self._keep_from(model)
        self._install(model)
        self.to(self._device)

    @torch.no_grad()
    def __call__(self, images: Sequence[torch.Tensor]) -> dict[str, Any]:
        """
        Args:
            images: (3, H, W) each, in [0, 255], in the order ``image_format``, on the teacher's
                device.

        Returns:
            the tapped outputs by name; maps are (N, C, H, W).
        """
        self.load()
        if not self._names and not self._heads:
            return {}
        if self._tap is None:
            raise RuntimeError("No output of the teacher is tapped: call tap() first.")
        batch = self._preprocess(images)
        # The teacher's precision is its own, whatever the student trains in.
        with torch.autocast(batch.device.type, enabled=False):
            if self._compiled is not None:
                outputs = self._compiled(batch)
                return {level: outputs[level] for level in self._names}
            with self._tap as found:
                self.backbone(batch)
        return found

    def _install(self, model: Any) -> None:
        """Take a detector: freeze it, and keep of it what is used."""
        model.requires_grad_(False).eval()
        self.model, self.backbone = model, model.backbone
        self.pixel_mean, self.pixel_std = model.pixel_mean.detach(), model.pixel_std.detach()
        if self.loaded:
            if self._fold_bn:
                fold_batch_norms(self.backbone)
            self.backbone.to(dtype=self.dtype, memory_format=self._memory_format)
            if self._compile:
                self._compiled = torch.compile(self.backbone)
        self._retap()

    def _retap(self) -> None:
        if not self._names and self._heads:
            return
        paths = [name for name in self._names if name not in self.levels]
        self._tap = Tap(self.model if paths else self, self._names)
        if self.loaded and not self._heads:
            self.model = None

    def _keep_from(self, model: Any) -> None:
        self.kept = {
            name: value.detach().clone()
            for name, value in model.state_dict().items()
            if name.startswith(tuple(self._kept_prefixes)) and self._kept_prefixes
        }

    def set_image_format(self, image_format: str) -> None:
        """Set the channel order of the images, unless it is set.

        Raises:
            ValueError: one that is not the teacher's and cannot be converted to it.
        """
        self.image_format = self.image_format or image_format
        pair = {self.input_format, self.image_format}
        if len(pair) > 1 and pair != {"BGR", "RGB"}:
            raise ValueError(
                f"INPUT.FORMAT is {self.image_format!r}, but the teacher's is "
                f"{self.input_format!r}; expected the same, or BGR and RGB, between which images "
                "are converted."
            )

    def _preprocess(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        if self.input_format != (self.image_format or "BGR"):
            images = [image.flip(0) for image in images]
        images = [(image - self.pixel_mean) / self.pixel_std for image in images]
        # 0.6 knows size_divisibility alone; main adds constraints such as ViT's square padding.
        constraints = getattr(self.backbone, "padding_constraints", None)
        options = {"padding_constraints": constraints} if constraints else {}
        square = (constraints or {}).get("square_size", 0)
        longest = max(side for image in images for side in image.shape[-2:])
        if 0 < square < longest:
            raise ValueError(
                f"INPUT.MAX_SIZE_TRAIN: an image has a side of {longest} pixels, but the teacher "
                f"pads images to squares of {square}; expected at most that. Set "
                f"INPUT.MAX_SIZE_TRAIN to {square}."
            )
        padded = ImageList.from_tensors(images, self.backbone.size_divisibility, **options)
        return padded.tensor.to(self.dtype, memory_format=self._memory_format)


def teacher_dtype(cfg: CfgNode) -> torch.dtype:
    """The precision of ``TEACHER.PRECISION``.

    Raises:
        ValueError: an unknown one.
    """
    name = cfg.MODEL.DISTILL.TEACHER.PRECISION
    if name not in (*_DTYPES, "auto"):
        raise ValueError(
            f"MODEL.DISTILL.TEACHER.PRECISION is {name!r}; expected one of {[*_DTYPES, 'auto']}."
        )
    if name != "auto":
        return _DTYPES[name]
    if not cfg.SOLVER.AMP.ENABLED:
        return torch.float32
    return torch.float16 if cfg.MODEL.DEVICE.startswith("cuda") else torch.bfloat16


def fold_batch_norms(module: nn.Module) -> int:
    """Fold every batch norm of Detectron2's ``Conv2d`` layers into their weights, in place.

    A batch norm that is never trained again is one multiplication and one addition a channel, which
    the convolution before it can do. Other norms are left as they are.

    Args:
        module: in eval mode, not to be trained again.

    Returns:
        the number of norms that were folded.
    """
    convolutions: list[Any] = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    folded = 0
    for conv in convolutions:
        if isinstance(getattr(conv, "norm", None), FrozenBatchNorm2d | _BatchNorm):
            norm = conv.norm
            # In double precision, so that folding itself rounds once.
            weight, bias = fuse_conv_bn_weights(
                conv.weight.double(),
                None if conv.bias is None else conv.bias.double(),
                *(norm.running_mean.double(), norm.running_var.double(), norm.eps),
                *(norm.weight.double(), norm.bias.double()),
            )
            dtype = conv.weight.dtype
            conv.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
            conv.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
            conv.norm = None
            folded += 1
    return folded
