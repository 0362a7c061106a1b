"""The config keys of ReviewKD."""

from detectron2.config import CfgNode as CN


def add_config(cfg: CN) -> None:
    """Add ``MODEL.DISTILL.REVIEWKD``, in place."""
    cfg.MODEL.DISTILL.REVIEWKD = CN()
    # Channels of the maps that pass from level to level, > 0.
    cfg.MODEL.DISTILL.REVIEWKD.CHANNELS = 256
    # Norm after its convolutions, any of Detectron2's: "BN" is the paper's, of each GPU by itself;
    # "SyncBN" of all together; "GN" of each image by itself.
    cfg.MODEL.DISTILL.REVIEWKD.NORM = "BN"
