"""Teachers of transformers: RT-DETR, RT-DETRv2 and D-FINE."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler
from torch import nn

from .module_teacher import ModuleTeacher as ModuleTeacher

logger = logging.getLogger(__name__)

#: Prefix of a name on the Hugging Face hub: "hf://PekingU/rtdetr_r50vd".
HUB = "hf://"
_CONFIG, _WEIGHTS = "config.json", ("model.safetensors", "pytorch_model.bin")
# Otherwise transformers asks on the terminal whether to run code of the folder.
_NO_CODE: Any = {"trust_remote_code": False}


class HubPathHandler(PathHandler):
    """Reads "hf://owner/name/file": a file of the Hugging Face hub, downloaded once."""

    def _get_supported_prefixes(self) -> list[str]:
        return [HUB]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        _import_transformers()
        from huggingface_hub import hf_hub_download

        owner, name, file = path.removeprefix(HUB).split("/", 2)
        return str(hf_hub_download(f"{owner}/{name}", file, force_download=force))

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        return PathManager.open(self._get_local_path(path), mode, buffering=buffering, **kwargs)


PathManager.register_handler(HubPathHandler(), allow_override=True)


class _HybridEncoder(nn.Module):
    """Backbone and hybrid encoder of an RT-DETR, without its decoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.encoder_input_proj = model.encoder_input_proj
        self.encoder = model.encoder
        for module in self.encoder.modules():
            # Positions are computed for the size of each batch, not stored for one size.
            if hasattr(module, "eval_size"):
                module.eval_size = None

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        mask = images.new_ones(images.shape[0], *images.shape[-2:])
        features = self.backbone(images, mask)
        projected = [
            project(feature)
            for project, (feature, _) in zip(self.encoder_input_proj, features, strict=True)
        ]
        return list(self.encoder(projected).last_hidden_state)


def is_rtdetr(name: str) -> bool:
    """Whether a teacher's name is a name of the hub or a folder of ``save_pretrained``."""
    return name.startswith(HUB) or os.path.isfile(os.path.join(os.path.expanduser(name), _CONFIG))


def rtdetr_weights(name: str) -> str:
    """The file of weights that belongs to such a name; it is not downloaded.

    Raises:
        ValueError: the folder has none.
    """
    if name.startswith(HUB):
        return f"{name.rstrip('/')}/{_WEIGHTS[0]}"
    for file in _WEIGHTS:
        path = os.path.join(os.path.expanduser(name), file)
        if os.path.isfile(path):
            return path
    raise ValueError(
        f"The folder {name!r} of a teacher has a {_CONFIG}, but none of {_WEIGHTS} as its weights."
    )


def load_rtdetr(name: str, *, weights: bool = True) -> ModuleTeacher:
    """An RT-DETR, RT-DETRv2 or D-FINE of ``transformers`` as a teacher.

    The maps after its hybrid encoder are p3, p4 and p5, of strides 8, 16 and 32 and, in the
    released models, 256 channels. It takes RGB images. Its own image processor squashes an image to
    640 x 640 pixels; a teacher must see the pixels that its student sees, so that here an image
    keeps the student's size and is padded by black to multiples of 32. INPUT.MIN_SIZE_TRAIN around
    640 gives it objects of the size that it was trained on.

    Args:
        name: a folder written by ``save_pretrained``, or a name on the Hugging Face hub such as
            "PekingU/rtdetr_r50vd", also with "hf://" before it.
        weights: False for random ones: then only the model's config is read.

    Raises:
        ImportError: transformers is not installed.
        ValueError: another kind of model, or weights that are missing or do not fit.
    """
    transformers = _import_transformers()
    path, missing = os.path.expanduser(name.removeprefix(HUB)), []
    detectors = transformers.AutoModelForObjectDetection
    try:
        if weights:
            model, info = detectors.from_pretrained(
                path, output_loading_info=True, dtype=torch.float32, **_NO_CODE
            )
            missing = sorted(k for k in info["missing_keys"] if "num_batches_tracked" not in k)
        else:
            model = detectors.from_config(transformers.AutoConfig.from_pretrained(path, **_NO_CODE))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The teacher {name!r} is not available as a detector of transformers: {error}"
        ) from error
    if missing:
        raise ValueError(
            f"The weights of the teacher {name!r} lack {len(missing)} tensors of its config "
            f"(e.g. {missing[:3]}); expected the whole model."
        )
    return rtdetr_teacher(model, **(_pixel_statistics(transformers, path) if weights else {}))


def rtdetr_teacher(
    model: nn.Module,
    *,
    pixel_mean: Sequence[float] = (0.0, 0.0, 0.0),
    pixel_std: Sequence[float] = (255.0, 255.0, 255.0),
) -> ModuleTeacher:
    """As :func:`load_rtdetr`, for a model that is in memory.

    Args:
        model: ``RTDetrForObjectDetection`` or ``RTDetrModel``, their v2, or those of D-FINE.
        pixel_mean, pixel_std: of pixels in [0, 255]; RT-DETR's own scale them to [0, 1].

    Raises:
        ValueError: a model without a hybrid encoder.
    """
    inner: Any = getattr(model, "model", model)
    lacking = [k for k in ("backbone", "encoder_input_proj", "encoder") if not hasattr(inner, k)]
    if lacking:
        raise ValueError(
            f"The teacher {type(model).__name__} has no {', '.join(lacking)}; expected an RT-DETR, "
            "RT-DETRv2 or D-FINE of transformers."
        )
    config = inner.config
    shapes = {
        f"p{int(stride).bit_length() - 1}": ShapeSpec(channels=channels, stride=int(stride))
        for stride, channels in zip(config.feat_strides, inner.encoder.out_channels, strict=True)
    }
    return ModuleTeacher(_HybridEncoder(inner), shapes, pixel_mean=pixel_mean, pixel_std=pixel_std)


def _pixel_statistics(transformers: Any, path: str) -> dict[str, list[float]]:
    """Mean and standard deviation of pixels in [0, 255], out of the model's image processor."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(path, **_NO_CODE)
    except (OSError, ValueError) as error:
        logger.warning(
            "%s has no image processor that is readable (%s): pixels are scaled to [0, 1], as "
            "those of RT-DETR are.",
            path,
            error,
        )
        return {}
    scale = processor.rescale_factor if processor.do_rescale else 1.0
    mean = processor.image_mean if processor.do_normalize else [0.0] * 3
    std = processor.image_std if processor.do_normalize else [1.0] * 3
    return {"pixel_mean": [m / scale for m in mean], "pixel_std": [s / scale for s in std]}


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "A teacher of the Hugging Face hub needs transformers, which is not installed: "
            "pip install 'ssim_kd[detr]'."
        ) from error
    return transformers
