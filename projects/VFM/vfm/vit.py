"""A ViT of timm as a frozen teacher of one map: its patch tokens."""

import difflib
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from torch import nn

from ssim_kd.checkpoint import local_file
from ssim_kd.modeling import FrozenTeacher
from ssim_kd.modeling.module_teacher import ModuleTeacher
from ssim_kd.modeling.timm_models import check_options, checked_overlay, import_timm

#: The name of the map.
TOKENS = "tokens"


class PatchTokens(nn.Module):
    """The patch tokens of a ViT after its last norm, (N, D, H / p, W / p); no prefix tokens."""

    def __init__(self, vit: nn.Module) -> None:
        """
        Args:
            vit: of timm, for images whose sides are any multiples of its patch size p.
        """
        super().__init__()
        self.vit = vit

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """
        Args:
            images: (N, 3, H, W), normalised.
        """
        options = {"indices": 1, "norm": True, "output_fmt": "NCHW", "intermediates_only": True}
        return list(self.vit.forward_intermediates(images, **options))  # type: ignore[operator]


def vit_teacher(
    name: str,
    weights: str = "timm",
    options: dict[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> FrozenTeacher:
    """A ViT that is hidden and frozen as every teacher is; its weights are loaded at the first use.

    It takes RGB images, normalised as timm's weights expect them, padded to multiples of the patch
    size.

    Args:
        name: of the model in timm.
        weights: "timm", or a file of the whole model.
        options: further arguments of ``timm.create_model``.
        dtype: of its weights and tokens.

    Raises:
        ImportError: timm is not installed.
        ValueError: a model that is not a ViT for images of any size, or no such file.
    """
    timm = import_timm("VFMDistiller")
    arguments = {"num_classes": 0, "dynamic_img_size": True}
    arguments |= check_options(options, key="options")
    if weights != "timm":
        local_file(weights, key="weights")

    def build(device: str, **pretrained: Any) -> ModuleTeacher:
        with torch.device(device):
            vit = timm.create_model(name, **arguments, **pretrained)
            patch = vit.patch_embed.patch_size
            if patch[0] != patch[1]:
                raise ValueError(f"its patches are of {patch[0]} x {patch[1]} pixels")
            shape = ShapeSpec(channels=vit.embed_dim, stride=patch[0])
            return ModuleTeacher(
                PatchTokens(vit),
                {TOKENS: shape},
                pixel_mean=[255 * x for x in vit.pretrained_cfg["mean"]],
                pixel_std=[255 * x for x in vit.pretrained_cfg["std"]],
            )

    def load(_prefix: str) -> tuple[nn.Module, str]:
        overlay = checked_overlay(timm, name, weights, arguments, key="weights")
        try:
            return build("cpu", pretrained=True, pretrained_cfg_overlay=overlay), ""
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"weights is {weights!r}: weights of {name} are not available "
                f"({type(error).__name__}: {error}). Expected a connection, or a file."
            ) from error

    try:
        structure = build("meta")
    except Exception as error:
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models("*vit*"), n=3)
        raise ValueError(
            f"name is {name!r}, which is not a ViT of timm {timm.__version__} for "
            f"images of any size with {arguments}: {type(error).__name__}: {error}. Near it are "
            f"{near}."
        ) from error
    return FrozenTeacher(structure, dtype=dtype, load=load)
