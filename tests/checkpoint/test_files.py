"""Reading of weights files: what is read, and what is refused, naming key and value."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ssim_kd.checkpoint import files, load_strictly, read_checkpoint, read_weights
from tests.checkpoint.weights import KEY, assert_loaded, load, python2_pickle, refused, zoo_format


@pytest.mark.parametrize(
    "wrap", ["model", "bare", "module.", "_orig_mod.", "state_dict", "with a trainer's state"]
)
def test_read_weights_wrapped(wrap, state, model, tmp_path) -> None:
    data: dict[str, Any] = {
        "model": {"model": state},
        "bare": dict(state),
        "module.": {"model": {f"module.{k}": v for k, v in state.items()}},
        "_orig_mod.": {"model": {f"_orig_mod.{k}": v for k, v in state.items()}},
        "state_dict": {"state_dict": state, "epoch": 3},
        "with a trainer's state": {"model": state, "trainer": {"iteration": 3}, "iteration": 3},
    }[wrap]
    torch.save(data, tmp_path / "weights.pth")
    assert load(model, tmp_path / "weights.pth") == []
    assert_loaded(model, state)


def test_read_weights_before_zip(state, model, tmp_path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"model": state}, file, _use_new_zipfile_serialization=False)
    assert load(model, file) == []
    assert_loaded(model, state)


@pytest.mark.parametrize("protocol", ["python 2", *range(2, pickle.HIGHEST_PROTOCOL + 1)])
def test_read_weights_zoo_pkl(protocol, state, model, tmp_path) -> None:
    file, data = tmp_path / "weights.pkl", zoo_format(state)
    file.write_bytes(
        python2_pickle(data) if protocol == "python 2" else pickle.dumps(data, protocol)
    )
    weights = read_weights(str(file), key=KEY)
    assert weights.author == "Detectron2 Model Zoo" and not weights.backbone_only
    assert load_strictly(model, weights, feature_path="backbone.") == []
    assert_loaded(model, state)


def test_read_weights_sha256(path) -> None:
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_weights(str(path), key=KEY).sha256 == expected


def test_read_weights_no_file(model, tmp_path) -> None:
    refused(model, "", "is empty; expected a .pth or .pkl file or a URL")
    refused(model, tmp_path / "none.pth", "no such file")
    refused(model, tmp_path, "no such file")
    (tmp_path / "model_final.pth").touch()
    refused(model, tmp_path / "model_best.pth", r"no such file.*\['model_final\.pth'\]")
    refused(model, "nowhere://weights.pkl", "nowhere://weights.pkl.*no handler")
    refused(model, "https://192.0.2.1/weights.pkl", "not available")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_read_weights_truncated(suffix, share, path, state, model, tmp_path) -> None:
    whole = path.read_bytes() if suffix == "pth" else pickle.dumps(zoo_format(state))
    file = tmp_path / f"cut.{suffix}"
    file.write_bytes(whole[: int(len(whole) * share)])
    message = refused(model, file, "not a checkpoint that can be read: it is truncated")
    assert f"({file.stat().st_size} bytes)" in message


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html><html><body>404</body></html>", b"\x00" * 300, b"PK\x03\x04"]
)
def test_read_weights_another_format(content, suffix, model, tmp_path) -> None:
    file = tmp_path / f"page.{suffix}"
    file.write_bytes(content)
    refused(model, file, rf"\({len(content)} bytes\) is not a checkpoint")


def test_read_checkpoint_flipped_bytes(path, model, tmp_path) -> None:
    whole = path.read_bytes()
    file = tmp_path / "flipped.pth"
    for place in (len(whole) // 4, len(whole) // 2, 3 * len(whole) // 4):
        damaged = bytearray(whole)
        damaged[place : place + 64] = bytes(b ^ 0x5A for b in damaged[place : place + 64])
        file.write_bytes(damaged)
        torch.load(file, weights_only=True)  # which notices nothing
        refused(model, file, "bytes of .* were changed after they were written")
    read_checkpoint(str(path))


class _Command:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_read_weights_code(suffix, state, model, tmp_path) -> None:
    mark, file = tmp_path / "it ran", tmp_path / f"evil.{suffix}"
    data = {**zoo_format(state), "extra": _Command(f"touch '{mark}'")}
    if suffix == "pth":
        torch.save(data, file)
    else:
        file.write_bytes(pickle.dumps(data))
    refused(model, file, "holds more than tensors")
    assert not mark.exists()
    pickle.loads(pickle.dumps(_Command(f"touch '{mark}'")))  # the command itself does work
    assert mark.exists()


@pytest.mark.parametrize(
    "data", [[torch.zeros(1)], {"model": torch.zeros(3)}, {"model": {"a": "text"}}, {"model": {}}]
)
def test_read_weights_no_dict_of_tensors(data, model, tmp_path) -> None:
    file = tmp_path / "odd.pth"
    torch.save(data, file)
    refused(model, file, "dict of tensors")


@pytest.mark.parametrize("in_zip", [True, False])
@pytest.mark.parametrize("protocol", range(1, pickle.HIGHEST_PROTOCOL + 1))
def test_read_checkpoint_protocols_of_torch_save(protocol, in_zip, tmp_path) -> None:
    tensors = {"a": torch.arange(999.0), "b": nn.Parameter(torch.ones(2).bfloat16())}
    data = {"model": OrderedDict(tensors), "step": 3, "size": torch.Size([1])}
    path = str(tmp_path / "saved.pth")
    torch.save(data, path, pickle_protocol=protocol, _use_new_zipfile_serialization=in_zip)
    found = read_checkpoint(path)
    assert found["step"] == 3 and found["size"] == torch.Size([1])
    for name, value in tensors.items():
        assert torch.equal(found["model"][name], value)


def test_read_checkpoint_without_checksums(tmp_path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(999.0)}, tmp_path / "saved.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    found = read_checkpoint(str(tmp_path / "saved.pth"))
    assert torch.equal(found["a"], torch.arange(999.0))


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize(
    "value",
    [np.float64(41.5), np.bool_(True), np.arange(4.0), Namespace(lr=0.5), Counter("aab")],
    ids=lambda value: type(value).__name__,
)
def test_read_checkpoint_values_next_to_tensors(value, protocol, state, tmp_path) -> None:
    torch.save({"model": state, "x": value}, tmp_path / "x.pth", pickle_protocol=protocol)
    assert np.all(read_checkpoint(str(tmp_path / "x.pth"))["x"] == value)


def test_read_checkpoint_tensors_in_a_pkl(state, tmp_path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"model": state}))
    found = read_checkpoint(str(path))["model"]
    assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize("protocol", [2, 5])
def test_read_checkpoint_names_what_it_refuses(protocol, tmp_path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"model": {}, "where": Path("x")}, path, pickle_protocol=protocol)
    with pytest.raises(ValueError, match=r"pathlib\.PosixPath") as raised:
        read_checkpoint(str(path))
    assert "\x1b" not in str(raised.value) and "\n" not in str(raised.value)


def test_read_checkpoint_compressed(tmp_path) -> None:
    """Whose tensors would be mapped as they are not."""
    torch.save({"model": {"a": torch.ones(9)}}, tmp_path / "whole.pth")
    with (
        zipfile.ZipFile(tmp_path / "whole.pth") as whole,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    with pytest.raises(ValueError, match="compressed"):
        read_checkpoint(str(tmp_path / "small.pth"))


@pytest.mark.parametrize("form", ["{path}", "file://{path}", "~/{path.name}"])
def test_local_file_forms_of_a_path(form, path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(path.parent))
    assert files.local_file(form.format(path=path), key=KEY) == str(path)
