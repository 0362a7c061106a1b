"""The config keys of FGD. The weights are those of Faster R-CNN."""

from detectron2.config import CfgNode as CN


def add_config(cfg: CN) -> None:
    """Add ``MODEL.DISTILL.FGD``, in place."""
    fgd = cfg.MODEL.DISTILL.FGD = CN()
    # Temperature of the attention maps. > 0.
    fgd.TEMPERATURE = 0.5
    # Weights of the feature loss in ground-truth boxes (alpha of the paper) and beyond (beta), of
    # the difference of the attention maps (gamma), and of the global relation (lambda). >= 0.
    fgd.FG_WEIGHT = 5e-5
    fgd.BG_WEIGHT = 2.5e-5
    fgd.ATTENTION_WEIGHT = 5e-5
    fgd.GLOBAL_WEIGHT = 5e-7
    # The batch that the weights belong to: [images, height, width, channels], the images' size in
    # pixels. Sums are brought to its number of cells and channels. [] is the sums as they are.
    fgd.REFERENCE = []
