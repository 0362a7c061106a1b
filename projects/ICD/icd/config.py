"""The config keys of ICD."""

from detectron2.config import CfgNode as CN


def add_config(cfg: CN) -> None:
    """Add ``MODEL.DISTILL.ICD``, in place."""
    icd = cfg.MODEL.DISTILL.ICD = CN()
    # Weight of the distillation, which trains the student, and of the two parts of the auxiliary
    # task, which train the decoder: is a box real, and how far off are its sides. >= 0. R-CNN has
    # 3, 1 and 1; dense detectors have 8, 1 and 1.
    icd.VALUE_WEIGHT = None
    icd.REAL_WEIGHT = None
    icd.SIDES_WEIGHT = None
    # Width of the decoder, its number of heads and the width of its hidden layer. HEADS divides
    # DIM, and so does 4.
    icd.DIM = 256
    icd.HEADS = 8
    icd.HIDDEN_DIM = 1024
    # Fake boxes for each real one, >= 0; fewer if an image would have more than MAX_BOXES boxes.
    # An image without real boxes has one fake box. R-CNN has at most 100 boxes, dense detectors
    # have 300.
    icd.FAKE_RATIO = 5.0
    icd.MAX_BOXES = None
    # Mean and deviation of the width and height of a fake box, as shares of the image's.
    icd.FAKE_SIZE = [0.2, 0.2]
    # How far the centre of a box is moved at most, in widths and heights of the box. From 0 to 0.5.
    icd.JITTER = 0.3
    # Iterations in which only the decoder and the student's projection learn.
    icd.DETACH_ITERS = 1000
    # Of the decoder and the student's projection: AdamW with a cosine to 0, gradients clipped at a
    # norm. Not of the student.
    icd.LR = 1e-4
    icd.WEIGHT_DECAY = 1e-4
    icd.CLIP_NORM = 0.01
