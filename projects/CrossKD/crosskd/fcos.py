"""A small FCOS: Detectron2's own FCOS is a LazyConfig with a full ResNet."""

from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

from ssim_kd.config import add_distill_config
from ssim_kd.config_files import merge_file
from ssim_kd.data import register_digits


def read_config(config_file: str) -> CfgNode:
    """A YAML config of digits, which are registered as it describes them."""
    cfg = get_cfg()
    add_distill_config(cfg)
    merge_file(cfg, config_file)
    register_digits(cfg)
    return cfg


def build_fcos(config_file: str, *, num_convs: int, norm: str = "BN", **kwargs: Any) -> FCOS:
    """An FCOS on the backbone and for the classes of a RetinaNet.

    Args:
        config_file: the RetinaNet's YAML; pixel mean and deviation are its too.
        num_convs: of each tower.
        norm: after the convolutions of the towers.
        kwargs: further ones of :class:`FCOS`.
    """
    cfg = read_config(config_file)
    backbone = build_backbone(cfg)
    shapes = list(backbone.output_shape().values())
    classes = cfg.MODEL.RETINANET.NUM_CLASSES
    widths = [shapes[0].channels] * num_convs
    return FCOS(
        backbone=backbone,
        head=FCOSHead(
            input_shape=[ShapeSpec(channels=s.channels) for s in shapes],
            conv_dims=widths,
            num_classes=classes,
            norm=norm,
        ),
        num_classes=classes,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
        **kwargs,
    )
