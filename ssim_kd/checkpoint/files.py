"""Checkpoint files, read without running code of theirs."""

import hashlib
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager

from ..sharing import without_queries
from ..unpickling import read_pickle, read_torch_file, reason_of

# Keys under which training programs keep the model, and what wrappers put before every name.
_MODEL_KEYS = ("model", "state_dict")
_WRAPPERS = ("module.", "_orig_mod.")


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


def local_file(path: str, *, key: str) -> str:
    """The local path of a file or URL, downloaded if need be.

    Args:
        path: a file, which may begin with ``~``, or a URL that Detectron2's PathManager knows.
        key: the config key that named it, for the message.

    Raises:
        ValueError: nothing is there, or the download fails.
    """
    if not path:
        raise ValueError(f"{key} is empty; expected a .pth or .pkl file or a URL.")
    shown = without_queries(path)
    try:
        local = PathManager.get_local_path(os.path.expanduser(path.removeprefix("file://")))
    except Exception as error:
        advice = f" Download it elsewhere, and set {key} to the file." if "://" in path else ""
        # Some readers quote a part of the URL.
        reason = without_queries(reason_of(error)).replace(path[len(path.split("?")[0]) :], "")
        raise ValueError(
            f"{key} is {shown!r}, which is not available: {reason}.{advice}"
        ) from error
    if not os.path.isfile(local):
        if "://" in str(local):
            reason = f"no handler of Detectron2's PathManager reads it. Set {key} to a file."
        else:
            there = sorted(path.name for path in Path(local).parent.glob("*.pth"))
            reason = "no such file. " + (
                f"Its folder has {there}." if there else "Correct the path, or make the file first."
            )
        raise ValueError(f"{key} is {shown!r}: {reason}")
    return str(local)


def read_checkpoint(local: str) -> dict[str, Any]:
    """Read a .pth (as torch.save writes it, with any of its options) or a zoo-format .pkl.

    Returns:
        the file's dict.

    Raises:
        ValueError: not a checkpoint, a truncated one, one that holds more than tensors, arrays
            and plain values, or a .pth whose bytes do not have the checksums that they were
            written with; names the reason and the size. A .pkl, a .pth of before torch 1.6 and
            one that was saved without them carry no checksums.
    """
    try:
        data = read_pickle(local) if local.endswith(".pkl") else _read_pth(local)
    except Exception as error:
        raise ValueError(
            f"{local} ({os.path.getsize(local)} bytes) is not a checkpoint that can be read: it is "
            f"truncated, of another format, or holds more than tensors ({reason_of(error)})."
        ) from error
    if not isinstance(data, Mapping):
        raise ValueError(f"{local} holds a {type(data).__name__}; expected a dict of tensors.")
    return dict(data)


def _read_pth(path: str) -> Any:
    in_zip = is_zip(path)
    if in_zip:
        _check_sums(path)
    return read_torch_file(path, mmap=in_zip)


def read_file(path: str, *, key: str) -> tuple[str, dict[str, Any]]:
    """Fetch and read a file that the config names.

    Args:
        path: a file or a URL.
        key: the config key that named it, for messages.

    Returns:
        its local path, and its dict.

    Raises:
        ValueError: as :func:`local_file` and :func:`read_checkpoint`, with the key and its value.
    """
    local = local_file(path, key=key)
    try:
        return local, read_checkpoint(local)
    except ValueError as error:
        raise ValueError(f"{key} is {without_queries(path)!r}: {error}") from error


def is_zip(path: str) -> bool:
    """Whether a local file begins as those of torch.save since 1.6 do."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _check_sums(path: str) -> None:
    """Compare every file in a zip with its CRC: torch.load does not."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type for entry in archive.infolist()):
            # Tensors would be mapped as they lie there; a small file may fill the memory.
            raise zipfile.BadZipFile("it is compressed, which torch.save does not do; save it anew")
        if not any(entry.CRC for entry in archive.infolist()):
            return  # saved without: torch.serialization.set_crc32_options(False)
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"bytes of {damaged} were changed after they were written")


def sha256_of(path: str) -> str:
    """The SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_weights(path: str, *, key: str) -> Weights:
    """Read the weights of a detector.

    Args:
        path: .pth of Detectron2 or a bare state dict, or a zoo-format .pkl; a file or a URL.
        key: the config key that named it, for messages.

    Raises:
        ValueError: the file is missing, unreadable or holds no tensors.
    """
    local, data = read_file(path, key=key)
    where, tensors = model_of(data)
    entries = tensors if isinstance(tensors, Mapping) else {}
    found = {
        name: torch.as_tensor(value)
        for name, value in entries.items()
        if isinstance(value, np.ndarray | np.generic | torch.Tensor | int | float)
    }
    if len(found) < len(entries) or not any(value.dim() for value in found.values()):
        raise ValueError(
            f"{key} is {without_queries(path)!r}, whose {where} is a {type(tensors).__name__}, not "
            f"a dict of tensors ({len(found)} of {len(entries)} entries are tensors)."
        )
    return Weights(
        path=path,
        key=key,
        tensors=found,
        author=str(data.get("__author__", "")),
        backbone_only=bool(data.get("matching_heuristics", False)),
        sha256=sha256_of(local),
    )


def model_of(data: Mapping[str, Any]) -> tuple[str, Any]:
    """The place of the model in a checkpoint, and its content.

    Returns:
        the key ("content" for a bare state dict), and the value under it; prefixes that DDP and
        torch.compile put before every name are removed.
    """
    where = next((key for key in _MODEL_KEYS if key in data), "content")
    model = data.get(where, data)
    for prefix in _WRAPPERS:
        if isinstance(model, Mapping) and model and all(k.startswith(prefix) for k in model):
            model = {name.removeprefix(prefix): value for name, value in model.items()}
    return where, model
