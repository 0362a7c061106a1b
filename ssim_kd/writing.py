"""Writes files that are whole or not there, also after a kill or a loss of power."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from detectron2.utils.file_io import HTTPURLHandler, PathManager

# Ending of a file, and name of a folder, that is being written.
_TEMPORARY = ".tmp"
_UNFINISHED = ".unfinished"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Downloads(HTTPURLHandler):
    """Downloads into its cache: with "..", the URL of a received file names any place."""

    def _get_local_path(self, path: str, *args: Any, **kwargs: Any) -> str:
        if ".." in path.partition("?")[0].split("/"):
            raise ValueError("its URL has '..' in it; expected one that names the file itself")
        return str(super()._get_local_path(path, *args, **kwargs))


if type(PathManager._path_handlers.get("http://")) is HTTPURLHandler:  # a user's stays
    PathManager.register_handler(_Downloads(), allow_override=True)


def is_remote(path: str) -> bool:
    """Whether a path is one of Detectron2's PathManager, such as s3://bucket/run."""
    return "://" in path


def folder_of(path: str) -> str:
    """The folder of a file, which may be remote; "" for a bare name."""
    return path[: path.rindex("/") + 1] if is_remote(path) else os.path.dirname(path)


def write_atomically(path: str, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file that is either whole or not there.

    A local one is written next to its place, synced and renamed; a symbolic link is replaced, not
    followed. A remote one is written on this machine, then copied.

    Args:
        path: of the file; one that is there is replaced.
        write: writes the content to the open binary file.

    Raises:
        OSError: the write failed; names the path and the space that is left.
    """
    if is_remote(path):
        _write_remote(path, write)
        return
    temporary = f"{path}{_TEMPORARY}"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        written = os.path.getsize(temporary) if os.path.isfile(temporary) else 0
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        # torch.save turns a full disk into a RuntimeError.
        if isinstance(error, OSError | RuntimeError):
            raise _not_written(path, error, written) from error
        raise
    _sync(os.path.dirname(path) or ".")


def _write_remote(path: str, write: Callable[[IO[bytes]], Any]) -> None:
    try:
        with tempfile.TemporaryFile() as file:
            write(file)
            file.seek(0)
            with PathManager.open(path, "wb") as target:
                shutil.copyfileobj(file, target)
    except (OSError, RuntimeError) as error:
        raise OSError(f"{path} could not be written: {error}") from error


@contextlib.contextmanager
def write_together(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Write files of a folder that belong together.

    After a kill or an error the earlier ones are there, whole. A kill within the renames at the
    end leaves the folder without the last file.

    Args:
        folder: made if missing; its other files stay.
        names: of all files that may belong together. Those that are not written are removed. The
            last is removed first and written last: if it exists, the others are whole and fit it.

    Yields:
        an empty folder to write them into.

    Raises:
        OSError: a write failed; of a full disk, names the folder and the space that is left.
    """
    unfinished = folder / _UNFINISHED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.mkdir()
        yield unfinished
        for path in unfinished.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        (folder / names[-1]).unlink(missing_ok=True)
        for name in names:
            if (unfinished / name).exists():
                os.replace(unfinished / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        _sync(folder)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        written = sum(path.stat().st_size for path in unfinished.glob("*"))
        raise _not_written(folder, error, written) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _not_written(path: Any, error: BaseException, written: int) -> OSError:
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    space = ""
    if os.path.isdir(folder):
        free = shutil.disk_usage(folder).free
        space = f" ({free} bytes are free after {written} that were removed again)"
    return OSError(f"{path} could not be written{space}: {error}. Earlier files are whole.")


def _sync(folder: str | Path) -> None:
    """Sync a folder: a new name is on the disk only then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(folder: str) -> list[str]:
    """Remove the unfinished files of a killed run.

    Args:
        folder: exists; no other run writes checkpoints there.

    Returns:
        the paths that were removed.
    """
    found = [
        os.path.join(folder, name)
        for name in sorted(os.listdir(folder))
        if name.endswith((f".pth{_TEMPORARY}", f"last_checkpoint{_TEMPORARY}"))
    ]
    for path in found:
        os.unlink(path)
    return found
