"""The config keys of PKD."""

from detectron2.config import CfgNode as CN


def add_config(cfg: CN) -> None:
    """Add ``MODEL.DISTILL.PKD``, in place."""
    cfg.MODEL.DISTILL.PKD = CN()
    # Added to the standard deviation of a channel before it divides. > 0.
    cfg.MODEL.DISTILL.PKD.EPS = 1e-6
