"""A teacher in memory: a frozen detector whose taps are fixed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import ImageList
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .taps import Tap, tappable_levels


@dataclass(frozen=True)
class TeacherOptions:
    """How a teacher runs.

    Attributes:
        input_format: channel order that it was trained on.
        image_format: channel order of the images that it is given; "" for the student's.
        dtype: of the backbone's weights and maps. Heads stay in float32.
        fold_bn: whether batch norms are folded into the convolutions before them, in place.
        channels_last: memory format of its maps.
        compiled: whether the backbone is compiled; then only its outputs can be tapped.
    """

    input_format: str = "BGR"
    image_format: str = ""
    dtype: torch.dtype = torch.float32
    fold_bn: bool = False
    channels_last: bool = False
    compiled: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        """Of images and maps; a property, because torch.save takes no memory format."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


class LoadedTeacher:
    """A frozen detector with its weights: a call runs its preprocessing and backbone.

    It is made by :meth:`FrozenTeacher.load`. It is not an ``nn.Module``, so that the model that
    holds it shows it in no ``state_dict()``, ``parameters()``, ``modules()`` or DDP, and
    ``train()`` does not reach it. Every module in it is in eval mode, and no parameter asks for a
    gradient.

    Attributes:
        detector: with its heads; None if they were not asked for.
        backbone, pixel_mean, pixel_std: the feature path.
        sha256: of the weights' file; "" without one.
        kept: tensors by name, as they were loaded.
    """

    def __init__(
        self,
        model: Any,
        names: Sequence[str],
        options: TeacherOptions,
        *,
        heads: bool = False,
        keep: Sequence[str] = (),
        sha256: str = "",
    ) -> None:
        """
        Args:
            model: a detector with its weights; frozen in place.
            names, heads, keep: see :meth:`FrozenTeacher.load`.
            options: how it runs.
            sha256: of the weights' file.
        """
        model.requires_grad_(False).eval()
        state = model.state_dict() if keep else {}
        self.kept = {name: state[name].detach().clone() for name in keep}
        self.sha256 = sha256
        self.detector = model if heads else None
        self.backbone = model.backbone
        self.pixel_mean: torch.Tensor = model.pixel_mean.detach()
        self.pixel_std: torch.Tensor = model.pixel_std.detach()
        self._options = options
        if options.fold_bn:
            fold_batch_norms(self.backbone)
        self.backbone.to(dtype=options.dtype, memory_format=options.memory_format)
        self._compiled: Any = torch.compile(self.backbone) if options.compiled else None
        self._names = list(dict.fromkeys(names))
        paths = [name for name in self._names if name not in tappable_levels(self)]
        self._tap = Tap(model if paths else self, self._names)

    def to(self, device: torch.device | str) -> "LoadedTeacher":
        """Move it; its dtype stays its own."""
        (self.backbone if self.detector is None else self.detector).to(device)
        self.pixel_mean = self.pixel_mean.to(device)
        self.pixel_std = self.pixel_std.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Sequence[torch.Tensor]) -> dict[str, Any]:
        """
        Args:
            images: (3, H, W) each, in [0, 255], in the order ``image_format``, on the teacher's
                device.

        Returns:
            the tapped outputs by name; maps are (N, C, H, W).
        """
        batch = self._preprocess(images)
        # The teacher's precision is its own, whatever the student trains in.
        with torch.autocast(batch.device.type, enabled=False):
            if self._compiled is not None:
                outputs = self._compiled(batch)
                return {level: outputs[level] for level in self._names}
            with self._tap as found:
                self.backbone(batch)
        return found

    def _preprocess(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        if self._options.input_format != (self._options.image_format or "BGR"):
            images = [image.flip(0) for image in images]
        images = [(image - self.pixel_mean) / self.pixel_std for image in images]
        # 0.6 has only size_divisibility; main adds constraints such as ViT's square padding.
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
        return padded.tensor.to(self._options.dtype, memory_format=self._options.memory_format)


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
