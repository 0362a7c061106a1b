"""Pickles that were made to run code, to alter this process or to fill its memory are refused."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssim_kd import unpickling
from ssim_kd.unpickling import read_pickle, read_torch_file

FORMS = ("pkl", "pth", "pth of protocol 4", "pth without zip")


def write(form: str, content: bytes, folder: Path) -> Path:
    """A file whose objects are those of the opcodes given, without PROTO and STOP."""
    pickled = b"\x80\x04" * (form == "pth of protocol 4") + content + b"."
    path = folder / f"x.{form[:3]}"
    if form == "pkl":
        path.write_bytes(pickled)
    elif form == "pth without zip":
        start = [
            pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        ]
        path.write_bytes(b"".join([*start, pickled, pickle.dumps([], 2)]))
    else:
        torch.save({}, path)
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, pickled if name.endswith("data.pkl") else data)
    return path


def read(path: Path) -> Any:
    if path.suffix == ".pkl":
        return read_pickle(str(path))
    return read_torch_file(str(path), mmap=zipfile.is_zipfile(path))


def text(value: str) -> bytes:
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def a_global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


STATE = b"}" + text("payload") + text("x") + b"s"  # {"payload": "x"}
DTYPE = a_global("numpy", "dtype")
SCALAR = a_global("numpy._core.multiarray", "scalar")
# The start of an array of one number.
BUFFER = a_global("numpy._core.numeric", "_frombuffer") + b"(C\x08" + b"A" * 8
BUFFER += DTYPE + b"(" + text("f8") + b"tR"

RUNS_CODE = {
    "function": a_global("os", "system") + b"(" + text("touch ran") + b"tR",
    # Names of torch's dtypes were allowed of any module, which is imported.
    "module by the name of a dtype": a_global("payload", "float32"),
    "module by a dtype, as torch's": a_global("torch.payload", "float32"),
    "module by the name of an array's maker": a_global("payload", "scalar"),
    "attribute of what is allowed": a_global("numpy", "ndarray.__init__"),
    "attribute by protocol 4": text("numpy") + text("dtype.newbyteorder") + b"\x93",
    "instance": b"(ipayload\nRun\n",
    "object": b"(" + a_global("payload", "Run") + b"o",
    "eval": a_global("builtins", "eval") + b"(" + text("1") + b"tR",
    "getattr": a_global("builtins", "getattr") + b"(" + text("") + text("join") + b"tR",
    "a storage that is a pickle": a_global("torch.storage", "_load_from_bytes")
    + b"(B" + struct.pack("<I", 20) + b"cos\nsystem\n(V:\ntR.   tR",
    "extension": b"\x82\x01",
    "persistent id": b"Px\n",
}  # fmt: skip
ALTERS = {
    f"{module}.{name}{' by slots' * slots}": a_global(module, name)
    + (b"N" + STATE + b"\x86" if slots else STATE)
    + b"b"
    for module, name in (
        ("collections", "Counter"),
        ("collections", "OrderedDict"),
        ("argparse", "Namespace"),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
        ("builtins", "set"),
    )
    for slots in (False, True)
}
# Raw bytes as pointers to objects; sizes and strides that reach beyond the bytes.
POINTERS = {
    "dtype O": DTYPE + b"(" + text("O8") + b"\x89\x88tR",
    "dtype of fields": DTYPE + b"(" + text("i4,O8") + b"\x89\x88tR",
    "dtype of a class": DTYPE + b"(" + DTYPE + b"tR",
    "scalar": SCALAR + b"(" + DTYPE + b"(" + text("O8") + b"tRC\x08" + b"A" * 8 + b"tR",
    # Without the flags that say so, the dtype is taken for one of numbers.
    "scalar without flags": SCALAR + b"(" + DTYPE + b"(" + text("O8") + b"\x89\x88tR(K\x03"
    + text("|") + b"NNNK\x08K\x08K\x00tbC\x08" + b"A" * 8 + b"tR",
    "array beyond its bytes": BUFFER + b"(M\xff\xfft" + text("C") + b"tR",
    "array of negative size": BUFFER + b"(J\xff\xff\xff\xffJ\xff\xff\xff\xfft" + text("C") + b"tR",
}  # fmt: skip
FILLS = {
    "bytes": b"\x8e" + struct.pack("<Q", 1 << 42),
    "dtype": DTYPE + b"(" + text("S9999999999") + b"tR",
}
ATTACKS = RUNS_CODE | ALTERS | POINTERS | FILLS


@pytest.fixture(autouse=True)
def payload(tmp_path, monkeypatch) -> Iterator[None]:
    """A module that a file could import; neither it nor anything else has run."""
    (tmp_path / "payload.py").write_text("open('ran', 'w')\nfloat32 = Run = scalar = print\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    held = [*unpickling._ALL.values(), collections.Counter, collections.OrderedDict]
    before = [dict(vars(x)) for x in (*held, argparse.Namespace) if hasattr(x, "__dict__")]
    yield
    assert not Path("ran").exists() and "payload" not in sys.modules
    assert before == [dict(vars(x)) for x in (*held, argparse.Namespace) if hasattr(x, "__dict__")]
    assert not hasattr(torch._utils._rebuild_tensor_v2, "payload")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_read_attack(attack, form, tmp_path) -> None:
    path = write(form, ATTACKS[attack], tmp_path)
    with pytest.raises(Exception):  # noqa: B017
        read(path)


def test_read_attack_would_run(tmp_path) -> None:
    """The file does run code if it may."""
    pickle.loads(RUNS_CODE["function"] + b".")
    assert os.path.exists("ran")
    os.unlink("ran")


@pytest.mark.parametrize("form", FORMS)
def test_read_state_of_dtype(form, tmp_path) -> None:
    """Flags of the state are not taken; the order of bytes is."""
    state = b"(K\x03" + text(">") + b"NNNK\x08K\x01K\x3ft"
    dtype = DTYPE + b"(" + text("f8") + b"\x89\x88tR" + state + b"b"
    content = SCALAR + b"(" + dtype + text(struct.pack(">d", 1.0).decode("latin1")) + b"tR"
    found = read(write(form, content, tmp_path))
    assert found == 1.0 and isinstance(found, np.float64)


@pytest.mark.parametrize("form", FORMS)
def test_read_nested_many_times(form, tmp_path) -> None:
    """A pair of a pair ..., each the same twice: of 2^60 items, if each were looked at."""
    assert read(write(form, b")q\x00" + b"h\x00h\x00\x86q\x00" * 60, tmp_path))


@pytest.mark.parametrize("form", FORMS)
def test_read_memo_of_many(form, tmp_path) -> None:
    """The 2^31st object that it keeps is its first: 32 GB, if there were room for the others."""
    assert read(write(form, b"Nr\xff\xff\xff\x7f", tmp_path)) is None


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_read_pickle_of_plain_values(protocol, tmp_path) -> None:
    values = [{1, 2}, bytearray(b"x"), b"\xff", 1j, 2**80, "\xe9", None, True, 0.5, (1, [2])]
    values += [collections.Counter("aab"), collections.OrderedDict(b=1), np.arange(6).reshape(2, 3)]
    values += [
        np.array(["a", "bc"]),
        np.asfortranarray(np.eye(3, 2)),
        np.float16(2),
        np.dtype("f4"),
    ]
    values += [np.zeros((0, 3)), np.arange(6.0).reshape(2, 3).T]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(values, protocol))
    for found, value in zip(read_pickle(str(tmp_path / "x.pkl")), values, strict=True):
        assert type(found) is type(value) and np.all(found == value)
        if isinstance(value, np.ndarray):
            assert found.shape == value.shape
            assert found.dtype == value.dtype and found.flags.writeable
            assert found.flags.f_contiguous == value.flags.f_contiguous


@pytest.mark.parametrize("form", FORMS)
def test_read_circle(form, tmp_path) -> None:
    found = read(write(form, b"]q\x00h\x00a", tmp_path))
    assert found[0] is found
