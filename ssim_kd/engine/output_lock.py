"""The output folder of a run: its own, with one run in it at a time."""

import contextlib
import errno
import fnmatch
import logging
import os
from collections.abc import Iterator, Sequence

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..locks import LockHeldError, lock
from ..writing import is_remote

logger = logging.getLogger(__name__)

_NOT_AVAILABLE = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


# Files and folders of a run. What reads them follows links; what writes them must not.
_WRITTEN = (
    *(".lock", "config.yaml", "student.yaml", "log.txt*", "metrics.json", "run.json"),
    *("tracked_runs.json", "report.html", "not_finite_*.json", "events.out.*", "inference*"),
)


def make_output_dir(folder: str, *, teacher: Sequence[str] = (), key: str = "OUTPUT_DIR") -> None:
    """Make the folder of a run. Links in it that the run would write through are removed.

    Args:
        folder: local or remote; "" for an evaluation without a log.
        teacher: what names the teacher of a training: its config, folder or weights.
        key: of the config, for messages.

    Raises:
        ValueError: it cannot be made, or it is the teacher's own.
    """
    if not folder:
        return
    for name in teacher:
        path = os.path.expanduser(name)
        own = path if os.path.isdir(path) else os.path.dirname(path) or "."
        if os.path.exists(path) and os.path.realpath(own) == os.path.realpath(folder):
            raise ValueError(
                f"{key} is {folder!r}, the folder of the teacher {name!r}: the training would "
                "overwrite its files, or leave its own config next to them. Expected another "
                "folder."
            )
    try:
        PathManager.mkdirs(folder)
    except OSError as error:
        raise ValueError(
            f"{key} is {folder!r}, which cannot be made ({error.strerror or error}); expected "
            "a folder that can be written to."
        ) from error
    if is_remote(folder):
        return
    if not os.path.isdir(folder):
        raise ValueError(f"{key} is {folder!r}, which is a file; expected a folder.")
    for entry in os.scandir(folder):
        if entry.is_symlink() and _is_written(entry.name):
            target = os.readlink(entry.path)
            with contextlib.suppress(FileNotFoundError):  # another process of the run
                os.unlink(entry.path)
                logger.warning(
                    "Removed the symbolic link %s to %s, which the run would write through.",
                    *(entry.path, target),
                )


def _is_written(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in _WRITTEN)


@contextlib.contextmanager
def output_lock(folder: str) -> Iterator[None]:
    """Hold a folder for this run. If the file system has no locks, warn and continue.

    Args:
        folder: exists, or is a URL, which is not locked. Every process of a run calls this; the
            main one holds the lock.

    Raises:
        RuntimeError: another run writes there; on every process.
    """
    error = None
    with contextlib.ExitStack() as stack:
        if comm.is_main_process() and not is_remote(folder):
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
