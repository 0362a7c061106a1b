"""Weights files: what is read, and what is refused with a message that helps."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from ssim_kd.checkpoint import load_strictly, read_checkpoint, read_weights
from tests.helpers import build, save_weights, stock_config

KEY = "MODEL.DISTILL.TEACHER.WEIGHTS"


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return save_weights(stock_config("faster"), tmp_path_factory.mktemp("weights") / "good.pth")


@pytest.fixture(scope="module")
def state(path) -> dict[str, torch.Tensor]:
    return torch.load(path)["model"]


@pytest.fixture(scope="module")
def other_model() -> nn.Module:
    """The architecture of the file, with other weights."""
    return build(stock_config("faster"), seed=7)


@pytest.fixture
def model(other_model) -> nn.Module:
    with torch.no_grad():
        for value in other_model.state_dict().values():
            value.fill_(5)
    return other_model


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


# What is read


@pytest.mark.parametrize("wrap", ["model", "bare", "module.", "with a trainer's state"])
def test_a_pth_is_read_in_every_usual_form(wrap, state, model, tmp_path) -> None:
    data: dict[str, Any] = {
        "model": {"model": state},
        "bare": dict(state),
        "module.": {"model": {f"module.{k}": v for k, v in state.items()}},
        "with a trainer's state": {"model": state, "trainer": {"iteration": 3}, "iteration": 3},
    }[wrap]
    torch.save(data, tmp_path / "weights.pth")
    assert load(model, tmp_path / "weights.pth") == []
    assert_loaded(model, state)


def test_a_pth_of_before_zip_files_is_read(state, model, tmp_path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"model": state}, file, _use_new_zipfile_serialization=False)
    assert load(model, file) == []
    assert_loaded(model, state)


@pytest.mark.parametrize("protocol", ["python 2", *range(2, pickle.HIGHEST_PROTOCOL + 1)])
def test_a_pkl_of_the_zoo_is_read(protocol, state, model, tmp_path) -> None:
    file, data = tmp_path / "weights.pkl", zoo_format(state)
    file.write_bytes(
        python2_pickle(data) if protocol == "python 2" else pickle.dumps(data, protocol)
    )
    weights = read_weights(str(file), key=KEY)
    assert weights.author == "Detectron2 Model Zoo" and not weights.backbone_only
    assert load_strictly(model, weights, feature_path="backbone.") == []
    assert_loaded(model, state)


def test_other_classes_do_not_matter_on_the_feature_path(model, tmp_path) -> None:
    file = save_weights(
        stock_config("faster", "MODEL.ROI_HEADS.NUM_CLASSES", 3), tmp_path / "3.pth"
    )
    left = load(model, file)
    assert left and all(k.startswith("roi_heads.box_predictor.") for k in left)
    assert torch.equal(
        model.state_dict()["backbone.fpn_output2.weight"],
        torch.load(file)["model"]["backbone.fpn_output2.weight"],
    )
    with pytest.raises(ValueError, match=r"cls_score\.weight \(4, 32\) for \(6, 32\)"):
        load(model, file, feature_path="")


def test_the_hash_is_that_of_the_file(path) -> None:
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_weights(str(path), key=KEY).sha256 == expected


# What is refused: each message names the key, the value and what is wrong


def refused(model: nn.Module, path: Path | str, match: str, *, feature_path="backbone.") -> str:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=match) as caught:
        load(model, path, feature_path=feature_path)  # type: ignore[arg-type]
    message = str(caught.value)
    assert KEY in message
    assert not path or repr(str(path)) in message
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return message


def test_no_file(model, tmp_path) -> None:
    refused(model, "", "is empty; expected a .pth or .pkl file or a URL")
    refused(model, tmp_path / "none.pth", "no such file")
    refused(model, tmp_path, "no such file")
    refused(model, "nowhere://weights.pkl", "")
    refused(model, "https://192.0.2.1/weights.pkl", "cannot be fetched")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_a_truncated_file(suffix, share, path, state, model, tmp_path) -> None:
    whole = path.read_bytes() if suffix == "pth" else pickle.dumps(zoo_format(state))
    file = tmp_path / f"cut.{suffix}"
    file.write_bytes(whole[: int(len(whole) * share)])
    message = refused(model, file, "not a checkpoint that can be read: it is truncated")
    assert f"({file.stat().st_size} bytes)" in message


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html><html><body>404</body></html>", b"\x00" * 300, b"PK\x03\x04"]
)
def test_another_format(content, suffix, model, tmp_path) -> None:
    file = tmp_path / f"page.{suffix}"
    file.write_bytes(content)
    refused(model, file, rf"\({len(content)} bytes\) is not a checkpoint")


def test_flipped_bytes_in_a_pth(path, model, tmp_path) -> None:
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
def test_a_file_that_wants_to_run_code(suffix, state, model, tmp_path) -> None:
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
def test_a_file_without_a_dict_of_tensors(data, model, tmp_path) -> None:
    file = tmp_path / "odd.pth"
    torch.save(data, file)
    refused(model, file, "dict of tensors")


@pytest.mark.parametrize(
    ("opts", "match"),
    [
        (("MODEL.RESNETS.DEPTH", 101), r"\d+ keys unexpected .*res4\.6"),
        (("MODEL.RESNETS.WIDTH_PER_GROUP", 16), r"\d+ keys of another shape .* for \("),
        (("MODEL.FPN.OUT_CHANNELS", 16), r"fpn_lateral2\.weight \(16, 16, 1, 1\) for \(32, 16"),
    ],
    ids=["depth", "width", "FPN"],
)
def test_another_architecture(opts, match, model, tmp_path) -> None:
    file = save_weights(stock_config("faster", *opts), tmp_path / "other.pth")
    refused(model, file, match)


def test_another_kind_of_detector(model, tmp_path) -> None:
    file = save_weights(stock_config("retinanet"), tmp_path / "retinanet.pth")
    message = refused(model, file, r"does not fit GeneralizedRCNN")
    assert "fpn_lateral2.weight" in message and "top_block.p6.weight" in message


def test_another_normalisation(tmp_path) -> None:
    names = ("STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS", "WIDTH_PER_GROUP")
    width = [x for name in names for x in (f"MODEL.RESNETS.{name}", 32)]  # GN has 32 groups
    configs = [stock_config("c4", *width, "MODEL.RESNETS.NORM", norm) for norm in ("BN", "GN")]
    for config, other, match in (
        (configs[0], configs[1], r"\d+ keys missing .*running_mean"),
        (configs[1], configs[0], r"\d+ keys unexpected .*running_mean"),
    ):
        refused(build_model(config), save_weights(other, tmp_path / "other.pth"), match)


def test_the_file_of_an_imagenet_backbone(state, model, tmp_path) -> None:
    prefix = "backbone.bottom_up."
    bottom_up = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    file = tmp_path / "R-50.pkl"
    file.write_bytes(pickle.dumps({**zoo_format(bottom_up), "matching_heuristics": True}))
    refused(model, file, "the file of an ImageNet backbone; expected that of a trained detector")


def test_a_backbone_without_heads(state, model, tmp_path) -> None:
    file = tmp_path / "backbone.pth"
    torch.save({k: v for k, v in state.items() if k.startswith("backbone.")}, file)
    refused(model, file, "a backbone alone")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value, state, model, tmp_path) -> None:
    key = "backbone.bottom_up.res3.1.conv2.weight"
    damaged = {k: v.clone() for k, v in state.items()}
    damaged[key].view(-1)[7] = value
    torch.save({"model": damaged}, tmp_path / "nan.pth")
    refused(model, tmp_path / "nan.pth", re.escape(f"{key} holds NaN or Inf"))


def test_a_convolution_of_zeros(state, model, tmp_path) -> None:
    key = "backbone.fpn_output3.weight"
    torch.save({**state, key: torch.zeros_like(state[key])}, tmp_path / "zeros.pth")
    refused(model, tmp_path / "zeros.pth", re.escape(f"{key} is all zeros"))


def test_a_student_of_a_wrapper_is_refused_whole(state, model, tmp_path) -> None:
    torch.save({f"student.{k}": v for k, v in state.items()}, tmp_path / "wrapped.pth")
    message = refused(model, tmp_path / "wrapped.pth", r"\d+ keys missing", feature_path="")
    assert f"{len(state)} in the file" in message or "keys unexpected" in message
