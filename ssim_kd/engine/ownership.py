"""One run a folder."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from detectron2.utils import comm

logger = logging.getLogger(__name__)

_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
# Folders of this process. A lock of the kind below is no obstacle to the process that has it, and
# is lost when that closes any file of the same name.
_held: set[str] = set()


@contextmanager
def sole_owner(folder: str) -> Iterator[None]:
    """Hold a folder for this run; the lock goes with the process, however that ends.

    Where the file system has no locks, a warning says so.

    Args:
        folder: exists. Every process of a run calls this; the main one holds the lock.

    Raises:
        RuntimeError: another run writes there; on every process.
    """
    lock: IO[str] | None = None
    error = None
    path = os.path.realpath(os.path.join(folder, ".lock"))
    if comm.is_main_process() and "://" not in folder:
        lock, owner = _take(path)
        if lock is None:
            error = (
                f"OUTPUT_DIR {folder!r} is in use by another run ({owner}). Give this one a "
                "folder of its own."
            )
    error = comm.all_gather(error)[0]
    if error:
        raise RuntimeError(error)
    try:
        yield
    finally:
        if lock is not None:
            _held.remove(path)
            lock.close()


def _take(path: str) -> tuple[IO[str] | None, str]:
    """The locked file, or None and who has it."""
    if path in _held:
        return None, _mark()
    lock = open(path, "a+")  # noqa: SIM115
    try:
        # Unlike flock's, this lock is not shared by the processes that are forked from this one,
        # workers of a loader, which may outlive it by seconds.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            lock.seek(0)
            owner = lock.read()
            lock.close()
            return None, owner
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning(
            "%s cannot be locked (%s): see to it that no second run writes to this folder.",
            path,
            error.strerror,
        )
    lock.truncate(0)
    lock.write(_mark())
    lock.flush()
    _held.add(path)
    return lock, ""


def _mark() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
