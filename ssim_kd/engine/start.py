"""The weights that a student starts from: MODEL.WEIGHTS."""

import glob
import os
from urllib.parse import urlparse

from detectron2.checkpoint import detection_checkpoint
from detectron2.config import CfgNode

from ..checkpoint import local_file, read_file

KEY = "MODEL.WEIGHTS"


def check_start(cfg: CfgNode, *, resume: bool) -> None:
    """Fetch and read what the student starts from: nothing has been built yet.

    Args:
        cfg: of a training.
        resume: whether a checkpoint is taken instead where there is one.

    Raises:
        ValueError: it is missing, cannot be fetched or cannot be read.
    """
    # Of any kind: which one is whole is the checkpointer's to tell.
    resumes = resume and glob.glob(os.path.join(glob.escape(cfg.OUTPUT_DIR), "model_*.pth"))
    if cfg.MODEL.WEIGHTS and not resumes:
        read_file(_without_options(cfg.MODEL.WEIGHTS), key=KEY)


def start_file(cfg: CfgNode) -> str:
    """Where the weights lie on this machine, fetched if need be; "" if there are none.

    Raises:
        ValueError: nothing is there, or it cannot be fetched.
    """
    path = cfg.MODEL.WEIGHTS
    return local_file(_without_options(path), key=KEY) if path else ""


def _without_options(path: str) -> str:
    """Detectron2 main reads options behind a "?"; to 0.6 they are part of the name."""
    if not hasattr(detection_checkpoint, "parse_qs"):
        return path
    return urlparse(path)._replace(query="").geturl()
