"""The config keys of MGD."""

from detectron2.config import CfgNode as CN


def add_config(cfg: CN) -> None:
    """Add ``MODEL.DISTILL.MGD``, in place."""
    mgd = cfg.MODEL.DISTILL.MGD = CN()
    # Share of the student's cells that are set to 0 before the teacher's map is generated from the
    # rest (lambda of the paper). From 0 to below 1. R-CNN has 0.45, dense detectors have 0.65.
    mgd.MASK_RATIO = None
    # The batch that LOSS_WEIGHT belongs to: [images, height, width, channels], the images' size in
    # pixels. The sum is brought to its number of cells and channels. [] is the sum as it is.
    mgd.REFERENCE = []
