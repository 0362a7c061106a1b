"""One run in an output folder at a time."""

import contextlib
import errno
import logging
import os
from collections.abc import Iterator

from detectron2.utils import comm

from ..locks import LockHeldError, lock

logger = logging.getLogger(__name__)

_NOT_AVAILABLE = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextlib.contextmanager
def output_lock(folder: str) -> Iterator[None]:
    """Hold a folder for this run. Where the file system has no locks, warn and go on.

    Args:
        folder: exists, or is a URL, which is not locked. Every process of a run calls this; the
            main one holds the lock.

    Raises:
        RuntimeError: another run writes there; on every process.
    """
    error = None
    with contextlib.ExitStack() as stack:
        if comm.is_main_process() and "://" not in folder:
            path = os.path.join(folder, ".lock")
            try:
                stack.enter_context(lock(path, wait=False))
            except LockHeldError as holder:
                error = (
                    f"OUTPUT_DIR is {folder!r}, which another run uses ({holder}). Expected a "
                    "folder of its own for each run."
                )
            except OSError as found:
                if found.errno not in _NOT_AVAILABLE:
                    raise
                logger.warning(
                    "%s: locks are not available (%s). Make sure that no second run writes to "
                    "this folder.",
                    *(path, found.strerror),
                )
        error = comm.all_gather(error)[0]
        if error:
            raise RuntimeError(error)
        yield
