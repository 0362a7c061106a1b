"""Backbones by timm: any of its ``features_only`` models, below an FPN of Detectron2.

What stock Detectron2 needs in addition to ssim_kd's ``student.yaml`` to run such a student::

    from ssim_kd.modeling.timm_backbone import add_timm_config
    add_timm_config(cfg)                 # before cfg.merge_from_file("student.yaml")
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode as CN
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from ..config import add_timm_config as add_timm_config
from ..ops.options import check_choice
from .timm_models import check_options, checked_overlay, import_timm, levels_of

logger = logging.getLogger(__name__)

NORMS = ("BN", "FrozenBN", "SyncBN")


class TimmBackbone(Backbone):
    """A ``features_only`` model of timm as a Detectron2 backbone, without an FPN.

    The maps are named by their stride as those of Detectron2's ResNets are: res2 has stride 4.
    """

    def __init__(
        self,
        name: str,
        *,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        pretrained: str = "",
        norm: str = "FrozenBN",
        freeze_at: int = 0,
        in_channels: int = 3,
        options: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            name: of the model in timm.
            out_features: levels to give, in order of stride.
            pretrained: "", "timm", or a file of the whole model.
            norm: what becomes of batch norms, one of :data:`NORMS`.
            freeze_at: 0 freezes nothing, k > 0 the map of stride 2^k and all below it.
            in_channels: of the images.
            options: further arguments of ``timm.create_model``.

        Raises:
            ImportError: as :func:`import_timm`.
            ValueError: a value out of its range, options that load files, levels that the model
                lacks, weights that do not fit, or a model that does not take images of any size.
        """
        super().__init__()
        check_choice("MODEL.TIMM.NORM", norm, NORMS)
        timm = import_timm("MODEL.BACKBONE.NAME")
        arguments = {"in_chans": in_channels, **check_options(options, key="MODEL.TIMM.OPTS")}
        levels = levels_of(timm, name, arguments)
        wanted = {*out_features, *([f"res{freeze_at}"] if freeze_at else [])}
        if not out_features or not wanted <= set(levels):
            raise ValueError(
                f"MODEL.TIMM.OUT_FEATURES is {list(out_features)} and MODEL.BACKBONE.FREEZE_AT "
                f"{freeze_at}; {name} has the levels {list(levels)}, by which FREEZE_AT counts too."
            )
        names = sorted(wanted, key=lambda level: levels[level])
        indices = [levels[level] for level in names]
        if pretrained:
            overlay = checked_overlay(timm, name, pretrained, arguments)
            arguments |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
        try:
            self.body = timm.create_model(
                name, features_only=True, out_indices=indices, **arguments
            )
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"MODEL.TIMM.PRETRAINED is {pretrained!r}: weights of {name} are not available "
                f"({type(error).__name__}: {error}). Expected a connection, a file, or ''."
            ) from error
        self._names = names
        self._out_features = [level for level in names if level in out_features]
        info = self.body.feature_info
        self._out_feature_strides = dict(zip(names, info.reduction(), strict=True))
        self._out_feature_channels = dict(zip(names, info.channels(), strict=True))
        self._last = getattr(self.body, "output_fmt", "") == "NHWC"
        self._freeze(name, f"res{freeze_at}" if freeze_at else "", in_channels)
        self._set_norm(timm, norm)
        #: What the weights of timm were trained on, for images scaled to [0, 1] in RGB.
        self.pixel_mean = tuple(self.body.pretrained_cfg["mean"])
        self.pixel_std = tuple(self.body.pretrained_cfg["std"])

    @property
    def size_divisibility(self) -> int:
        """The greatest stride."""
        return max(self._out_feature_strides.values())

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            images: (N, C, H, W).

        Returns:
            the maps (N, C, H / stride, W / stride) by level.
        """
        maps = self._all_maps(images)
        return {level: maps[level] for level in self._out_features}

    def _all_maps(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.body(images)
        if self._last:
            maps = [m.permute(0, 3, 1, 2).contiguous() for m in maps]
        return dict(zip(self._names, maps, strict=True))

    def _freeze(self, name: str, level: str, in_channels: int) -> None:
        """Freeze what a level depends on, and what no level that is given depends on.

        Autograd says which parameters these are: timm's models have no common structure.
        """
        side = 2 * self.size_divisibility
        device = next(self.body.parameters()).device
        try:
            maps = self.body.eval() and self._all_maps(
                torch.zeros(1, in_channels, side, 2 * side, device=device)
            )
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"MODEL.TIMM.NAME is {name!r}, which does not take images of {side} x {2 * side} "
                f"pixels ({error}); expected a model for images of any size. Some become one by "
                "MODEL.TIMM.OPTS, e.g. ['strict_img_size', False]."
            ) from error
        self.body.train()
        for key, found in maps.items():
            stride, channels = self._out_feature_strides[key], self._out_feature_channels[key]
            expected = (1, channels, side // stride, 2 * side // stride)
            if tuple(found.shape) != expected:
                raise ValueError(
                    f"MODEL.TIMM.NAME is {name!r}, whose {key} has the shape {tuple(found.shape)}; "
                    f"expected {expected}."
                )
        reached = _reached(self.body, [maps[key] for key in self._out_features])
        frozen = _reached(self.body, [maps[level]]) if level else set()
        for parameter in self.body.parameters():
            parameter.requires_grad_(parameter in reached and parameter not in frozen)

    def _set_norm(self, timm: Any, norm: str) -> None:
        if norm == "FrozenBN":
            self.body = timm.layers.freeze_batch_norm_2d(self.body)
            return
        for module in list(self.body.modules()):
            for key, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d) and not child.weight.requires_grad:
                    setattr(module, key, timm.layers.freeze_batch_norm_2d(child))
        if norm == "SyncBN":
            self.body = timm.layers.convert_sync_batchnorm(self.body)


def _reached(model: nn.Module, maps: list[torch.Tensor]) -> set[nn.Parameter]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = torch.stack([m.sum() for m in maps]).sum()
    grads = torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)
    return {p for p, grad in zip(parameters, grads, strict=True) if grad is not None}


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CN, input_shape: ShapeSpec) -> TimmBackbone:
    """The model of ``MODEL.TIMM`` without an FPN."""
    node = cfg.MODEL.TIMM
    if len(node.OPTS) % 2:
        raise ValueError(f"MODEL.TIMM.OPTS is {node.OPTS}; expected [NAME, VALUE, ...].")
    backbone = TimmBackbone(
        node.NAME,
        out_features=node.OUT_FEATURES,
        pretrained="" if cfg.MODEL.WEIGHTS else node.PRETRAINED,
        norm=node.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        in_channels=input_shape.channels,
        options=dict(zip(node.OPTS[::2], node.OPTS[1::2], strict=True)),
    )
    if node.PRETRAINED and input_shape.channels == 3:
        _warn_of_pixels(cfg, backbone)
    return backbone


def _warn_of_pixels(cfg: CN, backbone: TimmBackbone) -> None:
    """Compare how images are given with how timm's weights expect them."""
    mean = [255 * value for value in backbone.pixel_mean]
    std = [255 * value for value in backbone.pixel_std]
    given = [*cfg.MODEL.PIXEL_MEAN, *cfg.MODEL.PIXEL_STD]
    near = all(abs(a - b) < 1 for a, b in zip(given, mean + std, strict=True))
    if cfg.INPUT.FORMAT != "RGB" or not near:
        logger.warning(
            "%s was trained on RGB images with PIXEL_MEAN %s and PIXEL_STD %s; INPUT.FORMAT is %r, "
            "MODEL.PIXEL_MEAN %s and MODEL.PIXEL_STD %s.",
            cfg.MODEL.TIMM.NAME,
            [round(value, 3) for value in mean],
            [round(value, 3) for value in std],
            cfg.INPUT.FORMAT,
            list(cfg.MODEL.PIXEL_MEAN),
            list(cfg.MODEL.PIXEL_STD),
        )


def _fpn(cfg: CN, bottom_up: TimmBackbone, top_block: nn.Module) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CN, input_shape: ShapeSpec) -> FPN:
    """The model of ``MODEL.TIMM`` below an FPN with p6, as ``build_resnet_fpn_backbone``."""
    return _fpn(cfg, build_timm_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_fpn_backbone(cfg: CN, input_shape: ShapeSpec) -> FPN:
    """With p6 and p7 above res5, as ``build_retinanet_resnet_fpn_backbone``."""
    bottom_up = build_timm_backbone(cfg, input_shape)
    channels = bottom_up.output_shape()["res5"].channels
    return _fpn(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))
