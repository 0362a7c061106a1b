"""The teacher: a detector of any kind, frozen, of which the feature path alone is kept."""

import logging
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from detectron2.utils.file_io import PathManager

from ..checkpoint import load_strictly, read_weights
from ..config import add_distill_config, student_config
from .folding import fold_batch_norms
from .taps import FeatureTap, tappable_levels

logger = logging.getLogger(__name__)


def teacher_config(cfg: CfgNode) -> CfgNode:
    """The teacher's own config, out of ``MODEL.DISTILL.TEACHER``.

    Returns:
        a frozen config whose ``MODEL.WEIGHTS`` are the teacher's.

    Raises:
        ValueError: a config or weights that are not given, or cannot be found or understood.
    """
    node = cfg.MODEL.DISTILL.TEACHER
    name = node.CONFIG_FILE
    if not name:
        raise ValueError(
            "MODEL.DISTILL.TEACHER.CONFIG_FILE is empty; expected a name of the model zoo (e.g. "
            "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml) or a .yaml file."
        )
    teacher = get_cfg()
    add_distill_config(teacher)
    # A student that was distilled by another project can be a teacher: its keys are not ours.
    teacher.MODEL.DISTILL.set_new_allowed(True)
    in_zoo = not PathManager.isfile(name)
    path = _zoo_config(name) if in_zoo else name
    if path is None:
        raise ValueError(
            f"MODEL.DISTILL.TEACHER.CONFIG_FILE is {name!r}: neither a file nor a name of the "
            "model zoo (e.g. COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml)."
        )
    try:
        # The zoo's files come with Detectron2 and may run Python: its RetinaNets compute anchors.
        teacher.merge_from_file(path, allow_unsafe=in_zoo)
        teacher.merge_from_list(list(node.OPTS))
    except Exception as error:
        raise ValueError(
            f"The teacher's config cannot be read: MODEL.DISTILL.TEACHER.CONFIG_FILE {name!r} with "
            f"OPTS {list(node.OPTS)}: {error}"
        ) from error
    teacher.MODEL.WEIGHTS = _weights(node.WEIGHTS, name)
    teacher.MODEL.DEVICE = "cpu"
    return student_config(teacher)


def _zoo_config(name: str) -> str | None:
    try:
        return str(model_zoo.get_config_file(name))
    except RuntimeError:
        return None


def _weights(weights: str, config_file: str) -> str:
    """The file or URL of the teacher's weights."""
    name = weights or config_file
    if weights and not weights.endswith((".yaml", ".yml")):
        return weights
    try:
        return str(model_zoo.get_checkpoint_url(name))
    except RuntimeError as error:
        raise ValueError(
            f"MODEL.DISTILL.TEACHER.WEIGHTS is {weights!r} and the model zoo has no weights for "
            f"{name!r}; expected a .pth or .pkl file, a URL, or a name of the model zoo."
        ) from error


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
            input_format: channel order that the teacher was trained on, "BGR" or "RGB".
            student_format: channel order of the images it will be given.
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
        weights = read_weights(config.MODEL.WEIGHTS, key="MODEL.DISTILL.TEACHER.WEIGHTS")
        try:
            model = build_model(config)
        except Exception as error:
            raise ValueError(
                "The teacher cannot be built from MODEL.DISTILL.TEACHER.CONFIG_FILE "
                f"{cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE!r} with its OPTS: {error}"
            ) from error
        load_strictly(model, weights, feature_path="backbone.")
        node = cfg.MODEL.DISTILL.TEACHER
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
                f"MODEL.DISTILL.IN_FEATURES names {inner}, which a compiled teacher does not show: "
                "set MODEL.DISTILL.TEACHER.COMPILE to False."
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
