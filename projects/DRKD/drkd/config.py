"""The config keys of DRKD. Weights are those of Faster R-CNN."""

from detectron2.config import CfgNode as CN


def add_config(cfg: CN) -> None:
    """Add ``MODEL.DISTILL.DRKD``, in place."""
    drkd = cfg.MODEL.DISTILL.DRKD = CN()
    # Weights of the norms: of the maps after reasoning over all cells, of the boxes after attention
    # between them, and of the boxes as they are. >= 0.
    drkd.PIXEL_WEIGHT = 1e-3
    drkd.RELATION_WEIGHT = 4e-3
    drkd.INSTANCE_WEIGHT = 2.4e-3
    # Nodes that the cells of a level are gathered in, one number a level.
    drkd.NODES = [64, 64, 256, 256, 256]
    # On how many levels, from the first, boxes are compared.
    drkd.BOX_LEVELS = 2
    # The batch that the weights belong to: [images, height, width, channels], the images' size in
    # pixels. Norms are brought to its number of elements. [] is the norms as they are.
    drkd.REFERENCE = []
