"""The config keys of VFM."""

from detectron2.config import CfgNode as CN


def add_config(cfg: CN) -> None:
    """Add ``MODEL.DISTILL.VFM``, in place."""
    vfm = cfg.MODEL.DISTILL.VFM = CN()
    # A ViT of timm; a tag after it chooses among timm's weights:
    # "vit_small_patch16_dinov3.lvd1689m".
    vfm.NAME = "vit_small_patch16_dinov3"
    # Its weights: "timm" (timm's own, downloaded once), or a file of the whole model that timm
    # reads (.pth, .safetensors).
    vfm.WEIGHTS = "timm"
    # Further arguments of timm.create_model: [NAME, VALUE, ...].
    vfm.OPTS = []
