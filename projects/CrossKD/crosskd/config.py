"""The config keys of CrossKD."""

from detectron2.config import CfgNode as CN


def add_config(cfg: CN) -> None:
    """Add ``MODEL.DISTILL.CROSSKD``, in place.

    Weights of the two parts and temperature are the shared ``MODEL.DISTILL.HEAD``.
    """
    crosskd = cfg.MODEL.DISTILL.CROSSKD = CN()
    # CrossKDDistiller: after how many 3x3 convolutions of each tower the student's features enter
    # the teacher's tower, 1 to the number of convolutions. 0: they never do, and the student's own
    # predictions are compared, which is BCKD. RetinaNet has one less than the towers (3 of 4), FCOS
    # half of them.
    crosskd.DEPTH = None
    # True: a level counts only if an anchor of it is positive in this batch, as in BCKD's own code.
    crosskd.POSITIVE_LEVELS = False
