"""The config keys of FBKD."""

from detectron2.config import CfgNode as CN


def add_config(cfg: CN) -> None:
    """Add ``MODEL.DISTILL.FBKD``, in place."""
    fbkd = cfg.MODEL.DISTILL.FBKD = CN()
    # Temperature of the attention maps. > 0. R-CNN has 0.5, dense detectors have 0.1.
    fbkd.TEMPERATURE = None
    # True: the feature loss is weighted by the channel attention as well. R-CNN has False, dense
    # detectors have True.
    fbkd.CHANNEL_ATTENTION = None
    # Weights of the norms: of the features (weighted by attention), of each channel's mean, of each
    # cell's mean, and of the non-local relation. >= 0. R-CNN has 7e-5, 4e-3, 4e-3 and 7e-5, dense
    # detectors have six times that.
    fbkd.FEATURE_WEIGHT = None
    fbkd.CHANNEL_WEIGHT = None
    fbkd.SPATIAL_WEIGHT = None
    fbkd.NONLOCAL_WEIGHT = None
    # The non-local blocks by level: side of the max pooling of keys and values in cells, and inner
    # width in channels. One number a level; [] is the first of 8, 4, 2, 2, 2 and of 64, 64, 128,
    # 128, 128.
    fbkd.POOL_STRIDES = []
    fbkd.INNER_CHANNELS = []
    # The batch that the weights belong to: [images, height, width, channels], the images' size in
    # pixels. Norms are brought to its number of elements. [] is the norms as they are.
    fbkd.REFERENCE = []
