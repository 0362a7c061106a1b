"""The config keys of CWD."""

from detectron2.config import CfgNode as CN


def add_config(cfg: CN) -> None:
    """Add ``MODEL.DISTILL.CWD``, in place."""
    cfg.MODEL.DISTILL.CWD = CN()
    # Temperature of the softmax over the cells. > 0; the greater, the more cells count.
    cfg.MODEL.DISTILL.CWD.TEMPERATURE = 1.0
