"""Loading weights as a teacher's are; forms in which other programs write them."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ssim_kd.checkpoint import load_strictly, read_weights

KEY = "MODEL.DISTILL.TEACHER.WEIGHTS"


def load(model: nn.Module, path: Path, *, feature_path: str = "backbone.") -> list[str]:
    return load_strictly(model, read_weights(str(path), key=KEY), feature_path=feature_path)


def assert_loaded(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    for name, value in model.state_dict().items():
        # A counter that inference does not read, and constants of the config.
        if not name.endswith("num_batches_tracked") and not name.startswith("pixel_"):
            assert torch.equal(value, state[name]), name


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
    """Writes bytes and strings as Python 2 did, which the older files of the zoo hold."""

    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def _save_bytes(self, value: bytes | str) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)

    dispatch[bytes] = dispatch[str] = _save_bytes


def python2_pickle(data: Any) -> bytes:
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(data)
    return file.getvalue()


def zoo_format(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"model": {k: v.numpy() for k, v in state.items()}, "__author__": "Detectron2 Model Zoo"}


def refused(model: nn.Module, path: Path | str, match: str, *, feature_path="backbone.") -> str:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=match) as caught:
        load(model, path, feature_path=feature_path)  # type: ignore[arg-type]
    message = str(caught.value)
    assert KEY in message
    assert not path or repr(str(path)) in message
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return message
