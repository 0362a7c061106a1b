"""Files that are either whole or not there."""

import contextlib
import os
import shutil
from collections.abc import Callable
from typing import IO, Any

#: Ending of a file that is being written.
TEMPORARY = ".tmp"


def write_atomically(path: str, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a local file that is either whole or not there, also after a loss of power.

    Args:
        path: where it shall be; one that is there is replaced.
        write: writes the content to the open binary file.

    Raises:
        OSError: it could not be written; says how much space is left.
    """
    temporary = f"{path}{TEMPORARY}"
    folder = os.path.dirname(path) or "."
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        written = os.path.getsize(temporary) if os.path.exists(temporary) else 0
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        # torch.save turns a full disk into a RuntimeError.
        if isinstance(error, OSError | RuntimeError):
            raise OSError(
                f"{path} could not be written ({shutil.disk_usage(folder).free} bytes are free "
                f"after {written} that were removed again): {error}. Earlier files are whole."
            ) from error
        raise
    # The new name is on the disk when the folder is.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(folder: str) -> list[str]:
    """Remove what a killed run left half written.

    Args:
        folder: exists, and nobody else writes checkpoints there.

    Returns:
        the paths that were removed.
    """
    found = [
        os.path.join(folder, name)
        for name in sorted(os.listdir(folder))
        if name.endswith((f".pth{TEMPORARY}", f"last_checkpoint{TEMPORARY}"))
    ]
    for path in found:
        os.unlink(path)
    return found
