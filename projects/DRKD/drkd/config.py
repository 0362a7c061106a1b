"""The config keys of DRKD."""

from detectron2.config import CfgNode as CN


def add_config(cfg: CN) -> None:
    """Add ``MODEL.DISTILL.DRKD``, in place."""
    drkd = cfg.MODEL.DISTILL.DRKD = CN()
    # Weights of the norms: of the maps after reasoning over all cells, of the boxes after attention
    # between them, and of the boxes as they are. >= 0. R-CNN has 1e-3, 4e-3 and 2.4e-3, dense
    # detectors have 4e-3, 5e-3 and 6e-3.
    drkd.PIXEL_WEIGHT = None
    drkd.RELATION_WEIGHT = None
    drkd.INSTANCE_WEIGHT = None
    # Nodes that the cells of a level are gathered in, one number a level. [] is the first of 64,
    # 64, 256, 256, 256.
    drkd.NODES = []
    # On how many levels, from the first, boxes are compared.
    drkd.BOX_LEVELS = 2
    # The batch that the weights belong to: [images, height, width, channels], the images' size in
    # pixels. Norms are brought to its number of elements. [] is the norms as they are.
    drkd.REFERENCE = []
