"""Checkpoint files: read with suspicion, written atomically."""

import contextlib
import hashlib
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager

# Ending of a file that is being written.
_TEMPORARY = ".tmp"


@dataclass(frozen=True)
class Weights:
    """The tensors of a weights file.

    Attributes:
        path: as the user gave it.
        key: the config key that named it, for messages.
        tensors: by name.
        author: what the file says made it.
        backbone_only: whether it is a classifier's file, which names its tensors another way.
        sha256: of the file, hexadecimal.
    """

    path: str
    key: str
    tensors: dict[str, torch.Tensor]
    author: str
    backbone_only: bool
    sha256: str


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles containers and NumPy arrays alone: a weights file cannot run code."""

    _ALLOWED = {
        ("collections", "OrderedDict"): OrderedDict,
        ("numpy", "dtype"): np.dtype,
        ("numpy", "ndarray"): np.ndarray,
    }
    # What NumPy's arrays are rebuilt by, in its versions 1 and 2 and the protocols of pickle.
    _REBUILD = {
        ("_codecs", "encode"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy._core.numeric", "_frombuffer"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return self._ALLOWED[module, name]
        if (module, name) in self._REBUILD:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")


def load_pickle(path: str) -> Any:
    """Read a zoo-format .pkl of plain containers and NumPy arrays.

    Raises:
        pickle.UnpicklingError: the file asks for anything else.
    """
    with open(path, "rb") as file:
        return _ArrayUnpickler(file, encoding="latin1").load()


def local_file(path: str, *, key: str) -> str:
    """Where a file or URL lies on this machine, downloaded if need be.

    Args:
        path: a file or a URL that Detectron2's PathManager knows.
        key: the config key that named it, for the message.

    Raises:
        ValueError: nothing is there, or it cannot be fetched.
    """
    if not path:
        raise ValueError(f"{key} is empty; expected a .pth or .pkl file or a URL.")
    try:
        local = PathManager.get_local_path(path)
    except Exception as error:
        raise ValueError(f"{key} is {path!r}, which cannot be fetched: {error}") from error
    if not os.path.isfile(local):
        raise ValueError(f"{key} is {path!r}: no such file.")
    return str(local)


def read_checkpoint(local: str) -> dict[str, Any]:
    """Read a .pth (weights-only) or a zoo-format .pkl (arrays alone).

    Returns:
        the file's dict.

    Raises:
        ValueError: no checkpoint, one cut short, or a .pth whose bytes do not have the checksums
            that they were written with; says which, and how large the file is. A .pkl and a .pth
            of before torch 1.6 carry no checksums.
    """
    try:
        if local.endswith(".pkl"):
            data = load_pickle(local)
        else:
            in_zip = _is_zip(local)
            if in_zip:
                _check_sums(local)
            data = torch.load(local, map_location="cpu", weights_only=True, mmap=in_zip)
    except Exception as error:
        raise ValueError(
            f"{local} ({os.path.getsize(local)} bytes) is not a checkpoint that can be read: it is "
            f"truncated, of another format, or holds more than tensors ({_first_line(error)})."
        ) from error
    if not isinstance(data, Mapping):
        raise ValueError(f"{local} holds a {type(data).__name__}; expected a dict of tensors.")
    return dict(data)


def read_file(path: str, *, key: str) -> tuple[str, dict[str, Any]]:
    """Fetch and read a file that the config names.

    Args:
        path: a file or a URL.
        key: the config key that named it, for messages.

    Returns:
        where it lies on this machine, and its dict.

    Raises:
        ValueError: as :func:`local_file` and :func:`read_checkpoint`, with the key and its value.
    """
    local = local_file(path, key=key)
    try:
        return local, read_checkpoint(local)
    except ValueError as error:
        raise ValueError(f"{key} is {path!r}: {error}") from error


def _is_zip(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _check_sums(path: str) -> None:
    """Compare every file in a zip with its CRC: torch.load does not."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"bytes of {damaged} were changed after they were written")


def _sha256_of(path: str) -> str:
    """The SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def read_weights(path: str, *, key: str) -> Weights:
    """Read the weights of a detector.

    Args:
        path: .pth of Detectron2 or a bare state dict, or a zoo-format .pkl; a file or a URL.
        key: the config key that named it, for messages.

    Raises:
        ValueError: the file is missing, unreadable or holds no tensors.
    """
    local, data = read_file(path, key=key)
    tensors = data.get("model", data)
    if not isinstance(tensors, Mapping):
        raise ValueError(
            f"{key} is {path!r}, whose model is a {type(tensors).__name__} and no dict of tensors."
        )
    found = {
        name.removeprefix("module."): torch.as_tensor(value)
        for name, value in tensors.items()
        if isinstance(value, np.ndarray | torch.Tensor)
    }
    if not found or len(found) < len(tensors):
        raise ValueError(
            f"{key} is {path!r}, whose {'model' if 'model' in data else 'contents'} are not a dict "
            f"of tensors ({len(found)} of {len(tensors)} entries are)."
        )
    return Weights(
        path=path,
        key=key,
        tensors=found,
        author=str(data.get("__author__", "")),
        backbone_only=bool(data.get("matching_heuristics", False)),
        sha256=_sha256_of(local),
    )


def write_atomically(path: str, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a local file that is either whole or not there, also after a loss of power.

    Args:
        path: where it shall be; one that is there is replaced.
        write: writes the content to the open binary file.

    Raises:
        OSError: it could not be written; says how much space is left.
    """
    temporary = f"{path}{_TEMPORARY}"
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
        if name.endswith((f".pth{_TEMPORARY}", f"last_checkpoint{_TEMPORARY}"))
    ]
    for path in found:
        os.unlink(path)
    return found
