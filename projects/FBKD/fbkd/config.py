"""The config keys of FBKD. Weights and temperature are those of two-stage detectors."""

from detectron2.config import CfgNode as CN


def add_config(cfg: CN) -> None:
    """Add ``MODEL.DISTILL.FBKD``, in place."""
    fbkd = cfg.MODEL.DISTILL.FBKD = CN()
    # Temperature of the attention maps. > 0.
    fbkd.TEMPERATURE = 0.5
    # True: the feature loss is weighted by the channel attention as well, as for one-stage
    # detectors.
    fbkd.CHANNEL_ATTENTION = False
    # Weights of the norms: of the features (weighted by attention), of each channel's mean, of each
    # cell's mean, and of the non-local relation. >= 0.
    fbkd.FEATURE_WEIGHT = 7e-5
    fbkd.CHANNEL_WEIGHT = 4e-3
    fbkd.SPATIAL_WEIGHT = 4e-3
    fbkd.NONLOCAL_WEIGHT = 7e-5
    # The non-local blocks by level: side of the max pooling of keys and values in cells, and inner
    # width in channels. One number a level.
    fbkd.POOL_STRIDES = [8, 4, 2, 2, 2]
    fbkd.INNER_CHANNELS = [64, 64, 128, 128, 128]
    # The batch that the weights belong to: [images, height, width, channels], the images' size in
    # pixels. Norms are brought to its number of elements. [] is the norms as they are.
    fbkd.REFERENCE = []
