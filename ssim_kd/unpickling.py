"""Reads pickles of tensors, arrays and plain values without running code of theirs.

What a pickle asks for by name is made by functions of this module. It is given neither classes nor
functions of others, which it could call with any arguments or alter.
"""

import argparse
import io
import math
import pickle
import re
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import IO, Any

import numpy as np
import torch
from detectron2.structures import BoxMode
from torch import nn

# bool, (unsigned) integer, float, complex, bytes, text; objects (O) are pointers.
_DTYPE = re.compile(r"[biufcSU]\d{1,9}")


class _DType:
    """A dtype that is being read."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        if not isinstance(name, str) or not _DTYPE.fullmatch(name):
            raise pickle.UnpicklingError(f"it asks for the dtype {name!r:.40}")
        self.value = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        # Of the state only the order of bytes is taken: flags make pointers of numbers.
        self.value = self.value.newbyteorder(state[1])


class _Array:
    """An array that is being read."""

    def __init__(self) -> None:
        self.value = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *_, shape, dtype, fortran, data = state
        self.value = _made(data, dtype, shape, "F" if fortran else "C")


class _Namespace:
    """An argparse.Namespace that is being read."""

    def __init__(self) -> None:
        self.value = argparse.Namespace()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.value = argparse.Namespace(**state)


def _made(data: Any, dtype: _DType, shape: Any, order: Any) -> np.ndarray:
    # Python 2 has text for bytes.
    content = bytearray(data.encode("latin1") if isinstance(data, str) else data)
    if len(content) != math.prod(shape) * dtype.value.itemsize:
        raise pickle.UnpicklingError(f"it has {len(content)} bytes for an array of {shape}")
    return np.ndarray(shape, dtype.value, content, order=order)


def _frombuffer(data: Any, dtype: _DType, shape: Any, order: str, axes: Any = None) -> _Array:
    array = _Array()
    array.value = _made(data, dtype, shape, "C" if axes else order)
    if axes:
        array.value = array.value.transpose(axes)
    return array


def _scalar(dtype: _DType, data: Any) -> Any:
    return _made(data, dtype, (), "C")[()]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8"):
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r:.40}")
    return text.encode(encoding)


def _tensor(rebuild: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function of torch that gets no hooks."""
    return lambda *args: rebuild(*args[:4], bool(args[4]), OrderedDict(), *args[6:])


# What torch's own reader lacks. NumPy: its versions 1 and 2, every protocol of pickle.
_EXTRA: dict[str, Callable[..., Any]] = {
    "argparse.Namespace": _Namespace,
    "numpy.dtype": _DType,
    "numpy.ndarray": _Array,
    **{
        f"numpy.{core}.{name}": function
        for core in ("core", "_core")
        for name, function in (
            ("multiarray._reconstruct", lambda *_: _Array()),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _frombuffer),
        )
    },
}
_ALL: dict[str, Callable[..., Any]] = {
    **_EXTRA,
    "_codecs.encode": _encode,
    "builtins.bytearray": lambda *args: bytearray(*args),
    "builtins.bytes": lambda: b"",  # so protocols 0 to 2 have it
    "builtins.complex": lambda *args: complex(*args),
    "builtins.set": lambda *args: set(*args),
    "collections.Counter": lambda *args: Counter(*args),
    "collections.OrderedDict": lambda *args: OrderedDict(*args),
    # Of files of proposals.
    "detectron2.structures.boxes.BoxMode": lambda value: BoxMode(value),
    "torch.Size": lambda *args: torch.Size(*args),
    "torch.device": lambda *args: torch.device(*args),
    "torch._utils._rebuild_parameter": lambda data, grad, _: nn.Parameter(data, bool(grad)),
    "torch._utils._rebuild_tensor_v2": _tensor(torch._utils._rebuild_tensor_v2),
    "torch._utils._rebuild_tensor_v3": _tensor(torch._utils._rebuild_tensor_v3),
    # A tensor that was pickled without torch.save.
    "torch.storage._load_from_bytes": lambda data: torch.load(io.BytesIO(data), weights_only=True),
}


class _Builder:
    """Calls a function, and can itself not be altered by the pickle that is given it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it alters what it is read with")


# The one in C makes room for any number of objects that a file of 20 bytes says it has.
class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    def find_class(self, module: str, name: str) -> Any:
        # The name of Python 2, which protocols 0 to 2 keep.
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        found = _ALL.get(full)
        if found is not None:
            # A class as such: it can be asked for a new object. Its __setstate__ keeps it as it is.
            return found if isinstance(found, type) else _Builder(found)
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it asks for {full}, which is neither tensor nor array")


class _SafePickle:
    """As much of the module ``pickle`` as torch.load asks for."""

    Unpickler = _Unpickler

    @staticmethod
    def load(file: IO[bytes], **options: Any) -> Any:
        return _Unpickler(file, **options).load()


def read_pickle(path: str) -> Any:
    """Read a local pickle, of Python 2 too: numbers, text, arrays, tensors, containers of them.

    Raises:
        pickle.UnpicklingError: it asks for anything else.
        Exception: it is not a pickle, or a damaged one.
    """
    with open(path, "rb") as file:
        return _finished(_Unpickler(file, encoding="latin1").load(), {})


def read_torch_file(path: str, *, mmap: bool) -> Any:
    """Read what torch.save has written, with any of its options, to the CPU.

    Args:
        path: a local file.
        mmap: leave tensors in the file until they are read; for zip files only.

    Raises:
        pickle.UnpicklingError: it asks for more than tensors, arrays and plain values.
        Exception: it is another file, or a damaged one.
    """
    extra: list[Any] = [(function, name) for name, function in _EXTRA.items()]
    try:
        with torch.serialization.safe_globals(extra), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        # That reader knows no protocols of pickle but 2 and 3.
        options: Any = {"pickle_module": _SafePickle, "weights_only": False}
        found = torch.load(path, map_location="cpu", mmap=mmap, **options)
    return _finished(found, {})


def _finished(value: Any, seen: dict[int, tuple[Any, Any]]) -> Any:
    """Replace each reader by its array; ``seen`` keeps objects and their replacements."""
    kind: Any = type(value)
    if id(value) in seen:
        return seen[id(value)][1]
    if kind in (_Array, _DType):
        return value.value
    if kind is _Namespace:
        _finished(vars(value.value), seen)
        return value.value
    if kind is tuple:
        found = tuple(_finished(item, seen) for item in value)
        seen[id(value)] = value, found
        return found
    seen[id(value)] = value, value
    if kind in (dict, OrderedDict, Counter, list):
        # Of the class: what a pickle says of an object may hide its methods.
        items: Any = enumerate(value) if kind is list else kind.items(value)
        for key, item in list(items):
            done = _finished(item, seen)
            if done is not item:
                kind.__setitem__(value, key, done)
    return value


def reason_of(error: BaseException) -> str:
    """The line of an error that names its cause, without the escape codes of terminals."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


# What the readers read back, in addition to containers of these.
_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, set, argparse.Namespace),
    *(torch.Tensor, nn.Parameter, torch.Size, torch.dtype, torch.device),
)


def plain(value: Any, where: str = "") -> Any:
    """A state with NumPy's scalars as Python's, which every reader of checkpoints reads.

    Args:
        value: numbers, text, tensors, arrays, and containers of them.
        where: its place in the checkpoint, for the message.

    Raises:
        ValueError: anything else; names the place.
    """
    if isinstance(value, np.generic):
        value = value.item()
    kind = type(value)
    if kind in (list, tuple):
        return kind(plain(item, f"{where}/{i}") for i, item in enumerate(value))
    if kind in (dict, OrderedDict, Counter):
        items = {plain(k, where): plain(v, f"{where}/{k}".lstrip("/")) for k, v in value.items()}
        found: Any = kind(items)
        if hasattr(value, "_metadata"):  # the versions of a state dict's modules
            found._metadata = value._metadata
        return found
    if kind in _PLAIN or (kind is np.ndarray and not value.dtype.hasobject):
        return value
    raise ValueError(
        f"The checkpoint would hold a {kind.__module__}.{kind.__qualname__} at {where}, which a "
        "resume does not read. Expected numbers, text, tensors, arrays, and lists or dicts of them "
        "from the state_dict() that returned it. Nothing was written."
    )
