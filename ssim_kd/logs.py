"""The loggers of a training: a log file for each, and the log of other trainers."""

import logging
import os
import sys

from detectron2.utils import logger as detectron2_logger

_NAMES = ("detectron2", "fvcore", "ssim_kd")


def end_logs() -> None:
    """Take from the loggers what Detectron2's ``setup_logger`` gave them for an earlier training.

    A process may train several times: each has its own log.txt.
    """
    for name in _NAMES:
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            stream = getattr(handler, "stream", None)
            is_log = os.path.basename(str(getattr(stream, "name", ""))).startswith("log.txt")
            if type(handler) is logging.StreamHandler and (is_log or stream is sys.stdout):
                logger.removeHandler(handler)
    detectron2_logger.setup_logger.cache_clear()
    # Else a later log of the same name goes into the file that is open, even if it was removed.
    detectron2_logger._cached_log_stream.cache_clear()


def share_log() -> None:
    """Log where Detectron2 does, unless the loggers of ssim_kd have been set up.

    Other trainers than ours set up only Detectron2's.
    """
    ours, theirs = logging.getLogger("ssim_kd"), logging.getLogger("detectron2")
    if not ours.handlers and theirs.handlers:
        ours.handlers, ours.propagate = list(theirs.handlers), theirs.propagate
        ours.setLevel(theirs.level)
