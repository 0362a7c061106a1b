"""The config keys of DKD."""

from detectron2.config import CfgNode as CN


def add_config(cfg: CN) -> None:
    """Add ``MODEL.DISTILL.DKD``, in place."""
    cfg.MODEL.DISTILL.DKD = CN()
    # Weight of the target's probability against all others, >= 0.
    cfg.MODEL.DISTILL.DKD.ALPHA = 1.0
    # Weight of the probabilities among the others, >= 0.
    cfg.MODEL.DISTILL.DKD.BETA = 0.25
    # Temperature of the softmax, > 0.
    cfg.MODEL.DISTILL.DKD.TEMPERATURE = 1.0
