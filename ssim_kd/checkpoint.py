"""Reading weights that one can rely on: whole, of the right architecture, finite."""

import hashlib
import logging
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from torch import nn

logger = logging.getLogger(__name__)

# Keys that a complete checkpoint may lack or have beside the model's: constants of the config,
# anchors of old checkpoints, counters that inference does not read.
_TOLERATED = ("pixel_mean", "pixel_std", "anchor_generator.cell_anchors", "num_batches_tracked")
# A message names at most so many keys.
_NAMED = 5


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


def _is_zip(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _check_sums(path: str) -> None:
    """Compare every file in a zip with its CRC: torch.load does not."""
    with zipfile.ZipFile(path) as archive:
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
    local = local_file(path, key=key)
    try:
        data = read_checkpoint(local)
    except ValueError as error:
        raise ValueError(f"{key} is {path!r}: {error}") from error
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
        sha256=sha256_of(local),
    )


def load_strictly(model: nn.Module, weights: Weights, *, feature_path: str = "") -> list[str]:
    """Load weights into a model, all of them or none.

    Args:
        model: what the weights were trained for.
        weights: from :func:`read_weights`.
        feature_path: prefix of the keys that must fit; "" for all. Beside it, keys may differ
            (the heads of a teacher), as long as the file does hold a detector.

    Returns:
        the keys outside the feature path that did not fit.

    Raises:
        ValueError: a key that is missing, unexpected, of another shape, not finite, or an
            all-zero convolution; the model is unchanged.
    """
    if weights.backbone_only:
        raise ValueError(
            f"{weights.key} is {weights.path!r}, the file of an ImageNet backbone; expected that "
            "of a trained detector."
        )
    expected = {k: v for k, v in model.state_dict().items() if not _tolerated(k)}
    given = {k: v for k, v in weights.tensors.items() if not _tolerated(k)}
    missing = [k for k in expected if k not in given]
    unexpected = [k for k in given if k not in expected]
    misshaped = [k for k in expected if k in given and expected[k].shape != given[k].shape]
    problems = {
        "missing": [k for k in missing if k.startswith(feature_path)],
        "unexpected": [k for k in unexpected if k.startswith(feature_path)],
        "of another shape": [k for k in misshaped if k.startswith(feature_path)],
    }
    if any(problems.values()):
        raise ValueError(
            f"{weights.key} is {weights.path!r}, which does not fit {type(model).__name__} as its "
            f"config describes it: {_describe(problems, expected, given)}. Expected the weights of "
            "this very architecture; check the config beside them."
        )
    fitting = {k: v for k, v in given.items() if k in expected and k not in misshaped}
    if not any(not k.startswith(feature_path) for k in fitting) and feature_path:
        raise ValueError(
            f"{weights.key} is {weights.path!r}, which holds a backbone alone; expected a trained "
            "detector, heads included."
        )
    _check_values(weights, fitting)
    model.load_state_dict(fitting, strict=False)
    beside = [k for k in (*missing, *unexpected, *misshaped) if not k.startswith(feature_path)]
    if beside:
        logger.warning(
            "%s is %r, of which %d keys beside %s* are not as its config describes them (e.g. %s): "
            "other heads or classes. Its features alone are used.",
            weights.key,
            weights.path,
            len(beside),
            feature_path,
            beside[0],
        )
    return beside


def _tolerated(key: str) -> bool:
    return any(part in key for part in _TOLERATED)


def _describe(problems: dict[str, list[str]], expected: Mapping, given: Mapping) -> str:
    parts = []
    for what, keys in problems.items():
        if keys:
            named = [
                f"{k} {tuple(given[k].shape)} for {tuple(expected[k].shape)}"
                if k in given and k in expected
                else k
                for k in keys[:_NAMED]
            ]
            more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
            parts.append(f"{len(keys)} keys {what} ({', '.join(named)}{more})")
    return "; ".join(parts) + f"; {len(expected)} keys expected, {len(given)} in the file"


def _check_values(weights: Weights, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, value in tensors.items():
        if not value.is_floating_point():
            continue
        if not torch.isfinite(value).all():
            raise ValueError(
                f"{weights.key} is {weights.path!r}, whose {name} holds NaN or Inf: the file is "
                "damaged or its training diverged."
            )
        if value.dim() == 4 and value.numel() and not value.any():
            raise ValueError(
                f"{weights.key} is {weights.path!r}, whose convolution {name} is all zeros: these "
                "are not trained weights."
            )
