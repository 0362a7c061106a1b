"""A lock on a file: of OUTPUT_DIR while a run writes there, of the digits while they are drawn."""

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import portalocker

logger = logging.getLogger(__name__)

_FLAGS = portalocker.LockFlags
# Files that this process holds. See _let_go_in_child.
_held: set[IO[str]] = set()


class LockHeldError(RuntimeError):
    """Another run holds the lock; the message names its process and host."""


@contextlib.contextmanager
def lock(path: str | os.PathLike[str], *, wait: bool) -> Iterator[None]:
    """Hold an exclusive lock on a file. The operating system frees it when this process ends.

    Args:
        path: of the file, which is made if missing and stays; its folder exists.
        wait: whether to wait for another holder.

    Raises:
        LockHeldError: another holder, in this process or another, and ``wait`` is False.
        OSError: the file cannot be opened, or the file system has no locks (``errno`` is ENOSYS,
            ENOTSUP or ENOLCK).
    """
    # Not through a link in a folder that was received: it would be cleared.
    with open(path, "a+", opener=lambda p, flags: os.open(p, flags | os.O_NOFOLLOW, 0o666)) as file:
        try:
            _take(file, _FLAGS.EXCLUSIVE | _FLAGS.NON_BLOCKING)
        except BlockingIOError:
            holder = Path(path).read_text(errors="replace").strip() or "an unknown process"
            if not wait:
                raise LockHeldError(holder) from None
            logger.info("Waiting for %s, which holds %s", holder, path)
            _take(file, _FLAGS.EXCLUSIVE)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)


def _take(file: IO[str], flags: portalocker.LockFlags) -> None:
    try:
        portalocker.lock(file, flags)
    except portalocker.LockException as error:
        cause = error.args[0] if error.args else None
        if not isinstance(cause, OSError):
            raise
        if cause.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(cause.errno, cause.strerror) from None
        raise cause from None


def _let_go_in_child() -> None:
    """Close the files in a forked child: a loader's worker may outlive its run by seconds."""
    for file in list(_held):
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
