"""LazyConfigs saved as YAML: what they can hold, and how one is read without running code of it.

A saved LazyConfig names what to call, and ``LazyConfig.load`` calls whatever it names. Here only
parts of detectors are called: classes of Detectron2, torch.nn and ssim_kd.
"""

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pydoc import locate
from types import FunctionType, ModuleType
from typing import Any

import yaml
from detectron2.layers import ShapeSpec
from detectron2.modeling import box_regression
from detectron2.modeling.matcher import Matcher
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ..yaml_files import refuse_aliases_of_aliases

#: Modules that define the parts of detectors.
_PACKAGES = ("detectron2.modeling.", "detectron2.layers.", "ssim_kd.modeling.", "torch.nn.")
_PLAIN_CLASSES = (ShapeSpec, Matcher)
#: Key of a LazyConfig with the channel order of the images.
IMAGE_FORMAT = "dataloader.train.mapper.image_format"
_METHODS = ("make_stage", "make_default_stages")


def find_part(name: str) -> Any:
    """A part of a detector by its full name.

    Args:
        name: of an ``nn.Module`` in Detectron2's ``modeling`` or ``layers``, ``torch.nn`` or
            ``ssim_kd.modeling``, or of what these take; also of ResNet.make_default_stages.

    Raises:
        ValueError: anything else, which is not imported.
    """
    owner, _, method = name.rpartition(".")
    of_class = method in _METHODS
    if re.fullmatch(r"\w+(\.\w+)+", name) and name.startswith(_PACKAGES):
        part = locate(owner if of_class else name)
        if _is_part(part) and (not of_class or hasattr(part, method)):
            return getattr(part, method) if of_class else part
    raise ValueError(
        f"it calls {name!r}; expected parts of Detectron2, torch.nn and ssim_kd only. Name the "
        ".py file of its training instead, if you trust it, with MODEL.DISTILL.TEACHER.WEIGHTS"
    )


def _is_part(found: Any) -> bool:
    if not inspect.isclass(found) or not f"{found.__module__}.".startswith(_PACKAGES):
        return False
    plain = found in _PLAIN_CLASSES or found.__module__ == box_regression.__name__
    return plain or issubclass(found, nn.Module)


class _Loader(yaml.SafeLoader):
    """Reads what ``LazyConfig.save`` writes: plain values, tuples, classes of parts."""

    def name(self, suffix: str, _node: yaml.Node) -> Any:
        try:
            return find_part(suffix)
        except ValueError as error:
            raise yaml.constructor.ConstructorError(problem=str(error)) from error

    def partial(self, node: yaml.MappingNode) -> Any:
        # As pickle has it: function, arguments, keyword arguments, attributes.
        function, arguments, options, _ = self.construct_mapping(node, deep=True)["state"]
        return partial(function, *arguments, **options)


def _shape_spec(loader: yaml.SafeLoader, node: yaml.Node) -> ShapeSpec:
    # As Detectron2 0.6 has it; that of main is called by its name.
    return ShapeSpec(*loader.construct_sequence(node))


_PYTHON = "tag:yaml.org,2002:python/"
_Loader.add_constructor(f"{_PYTHON}tuple", lambda loader, node: loader.construct_sequence(node))
_Loader.add_constructor(f"{_PYTHON}object/new:{ShapeSpec.__module__}.ShapeSpec", _shape_spec)
_Loader.add_multi_constructor(f"{_PYTHON}name:", _Loader.name)
_Loader.add_constructor(f"{_PYTHON}object/apply:functools.partial", _Loader.partial)


def read_saved_model(path: str) -> DictConfig:
    """A saved LazyConfig with its node ``model``; of others only its images' format is read.

    Raises:
        ValueError: it names the class of something else than a part of a detector.
        yaml.YAMLError: it is not YAML, or holds other objects.
    """
    with PathManager.open(path, "r") as file:
        loader = _Loader(file)
        try:
            root = loader.get_single_node()
            image_format = _scalar(root, *IMAGE_FORMAT.split("."))
            pairs = root.value if isinstance(root, yaml.MappingNode) else []
            root.value = [pair for pair in pairs if pair[0].value == "model"]
            refuse_aliases_of_aliases(root, path)
            found = loader.construct_document(root)
        finally:
            loader.dispose()
    config = OmegaConf.create(found, flags={"allow_objects": True})
    OmegaConf.update(config, IMAGE_FORMAT, image_format)
    return config


def _scalar(node: Any, *keys: str) -> str | None:
    for key in keys:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        node = next((value for name, value in pairs if name.value == key), None)
    return str(node.value) if isinstance(node, yaml.ScalarNode) else None


def check_parts(node: DictConfig, known: Sequence[Any] = ()) -> None:
    """Check that a node calls parts of detectors only.

    Args:
        node: of a LazyConfig.
        known: what else it may call.

    Raises:
        ValueError: it calls more.
    """
    for target in targets_of(node):
        if target not in known:
            if isinstance(target, str):
                find_part(target)
            elif not _is_part(target):
                raise ValueError(f"it calls {target!r}; expected the name of a part of a detector")


def targets_of(node: Any) -> Iterator[Any]:
    """Everything that a node of a LazyConfig calls when it is instantiated."""
    if isinstance(node, DictConfig | ListConfig):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        node = list(node.values())
    for value in node if isinstance(node, list | tuple) else ():
        yield from targets_of(value)


def name_functions(node: Any) -> None:
    """Replace functions of a LazyConfig that YAML cannot name, in place: lambdas, say.

    One that passes its argument on, ``lambda c: NaiveSyncBatchNorm(c, stats_mode="N")``, becomes
    the same ``partial(NaiveSyncBatchNorm, stats_mode="N")``. Any other stays as it is.
    """
    keys: Any = node if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        value = node[key]
        if isinstance(value, DictConfig | ListConfig):
            name_functions(value)
        elif isinstance(value, FunctionType) and not _has_name(value):
            node[key] = _as_partial(value)


def _has_name(function: FunctionType) -> bool:
    module = sys.modules.get(function.__module__)
    return getattr(module, function.__qualname__, None) is function


class _Noted:
    """Stands for a name in a function, and notes what is called by it."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __getattr__(self, name: str) -> "_Noted":
        return _Noted(getattr(self._value, name))

    def __call__(self, *arguments: Any, **options: Any) -> partial:
        return partial(self._value, *arguments, **options)


def _as_partial(function: FunctionType) -> Any:
    names = {
        name: _Noted(value) if callable(value) or isinstance(value, ModuleType) else value
        for name, value in function.__globals__.items()
        if name in function.__code__.co_names
    }
    argument = object()
    run = (function.__code__, names, "", function.__defaults__, function.__closure__)
    try:
        call = FunctionType(*run)(argument)
        *before, last = call.args
    except Exception:
        return function
    values = [*before, *call.keywords.values()]
    plain = all(isinstance(value, str | int | float | None) for value in values)
    return partial(call.func, *before, **call.keywords) if last is argument and plain else function
