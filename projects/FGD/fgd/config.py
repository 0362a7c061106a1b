"""The config keys of FGD."""

from detectron2.config import CfgNode as CN


def add_config(cfg: CN) -> None:
    """Add ``MODEL.DISTILL.FGD``, in place."""
    fgd = cfg.MODEL.DISTILL.FGD = CN()
    # Temperature of the attention maps. > 0.
    fgd.TEMPERATURE = 0.5
    # Weights of the feature loss in ground-truth boxes (alpha of the paper) and beyond (beta), of
    # the difference of the attention maps (gamma), and of the global relation (lambda). >= 0. R-CNN
    # has 5e-5, 2.5e-5, 5e-5 and 5e-7; dense detectors have 1e-3, 5e-4, 5e-4 and 5e-6.
    fgd.FG_WEIGHT = None
    fgd.BG_WEIGHT = None
    fgd.ATTENTION_WEIGHT = None
    fgd.GLOBAL_WEIGHT = None
    # The batch that the weights belong to: [images, height, width, channels], the images' size in
    # pixels. Sums are brought to its number of cells and channels. [] is the sums as they are.
    fgd.REFERENCE = []
