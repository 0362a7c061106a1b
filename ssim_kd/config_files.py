"""Reads config files: with their bases, without running code, and with errors that say where."""

import copy
import difflib
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode as CN
from detectron2.config import LazyConfig
from detectron2.utils.file_io import PathManager
from fvcore.common.config import BASE_KEY
from omegaconf import DictConfig

_ZOO = os.path.join(os.path.dirname(model_zoo.__file__), "configs")
_PACKAGE = os.path.dirname(os.path.abspath(__file__))
# An installed ssim_kd has its configs inside, a checkout next to it.
_SHIPPED = tuple(os.path.join(f, "configs") for f in (_PACKAGE, os.path.dirname(_PACKAGE))) + (
    _ZOO,
)


class _FileByFile(CN):
    """Reads a config file and its bases; those of Detectron2's zoo alone may run code."""

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        in_zoo = _is_in(filename, _ZOO)
        loaded: dict[str, Any] = super().load_yaml_with_base(filename, allow_unsafe=in_zoo)
        return loaded


def find_config_file(name: str) -> str:
    """A config file; or one that ssim_kd or Detectron2's model zoo ships, by its path there.

    "COCO-Detection/ssim_retinanet_R_50_FPN_1x.yaml" needs no checkout.
    """
    if not name or PathManager.exists(name):
        return name
    shipped = [os.path.join(folder, name) for folder in _SHIPPED]
    return next((path for path in shipped if os.path.isfile(path)), name)


def _is_in(path: str, folder: str) -> bool:
    return os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), ""))


def merge_file(cfg: CN, path: str) -> set[str]:
    """Merge a config file that may not run code; its bases out of Detectron2's zoo may.

    Those come with Detectron2, and its RetinaNets compute their anchors so.

    Returns:
        the dotted names of the keys that the file and its bases set, but for those that ssim_kd or
        Detectron2's zoo ships.

    Raises:
        ValueError: a file or base that cannot be opened or holds no keys; a mapping with a key
            twice, of which YAML would take the last alone; bases in a circle.
        yaml.constructor.ConstructorError: a file of one's own that asks to run code.
        others: as ``CfgNode.merge_from_file``.
    """
    keys = _check_files(path)
    _FileByFile.load_yaml_with_base(path)
    cfg.merge_from_file(path, allow_unsafe=True)
    return keys


def is_lazy(path: str) -> bool:
    """Whether a config file is a LazyConfig."""
    return path.endswith(".py")


def is_saved_lazy_config(path: str) -> bool:
    """Whether a .yaml is what ``LazyConfig.save`` leaves in the folder of a run."""
    with PathManager.open(path, "r") as file:
        try:
            root = yaml.compose(file, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError):
            return False
    keys = [key.value for key, _ in root.value] if isinstance(root, yaml.MappingNode) else []
    return "model" in keys and "MODEL" not in keys


def load_lazy_file(path: str) -> DictConfig:
    """``LazyConfig.load``, which runs a file once in a process: it may register data sets.

    A file that has been written since is run again. A base of it that was is not noticed.
    """
    written = os.stat(path).st_mtime_ns if os.path.isfile(path) else 0
    return copy.deepcopy(_run_lazy_file(os.path.abspath(path) if written else path, written))


@functools.cache
def _run_lazy_file(path: str, written: int) -> DictConfig:
    return LazyConfig.load(path)


def did_you_mean(cfg: CN, message: str) -> str:
    """What may be meant by the unknown key that a message of yacs ends with.

    Args:
        cfg: the config that lacks the key.
        message: "Non-existent config key: MODEL.DISTILL.LOS", say.

    Returns:
        " Did you mean MODEL.DISTILL.LOSS?"; "" if no key is like it.
    """
    key = message.rsplit(": ", 1)[-1].strip("'\" ")
    known = dict.fromkeys(_dotted(cfg))
    sections = {name.rsplit(".", depth)[0] for name in known for depth in range(1, 6)}
    names = sorted({*known, *sections})
    near = near_keys(key, names, most=2, cutoff=0.85)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def near_keys(key: str, known: Sequence[str], *, most: int, cutoff: float) -> list[str]:
    """The known keys that are like one: those of its own section, else any.

    Args:
        key: dotted.
        known: dotted.
        most: how many, at the most.
        cutoff: the least likeness, 0 to 1, see :func:`difflib.get_close_matches`.
    """
    # TEMPERATURE is a name of several sections.
    section = key.rpartition(".")[0]
    beside = [name for name in known if section and name.rpartition(".")[0] == section]
    return difflib.get_close_matches(key, beside, most, cutoff) or difflib.get_close_matches(
        key, known, most, cutoff
    )


def _dotted(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _check_files(path: str, above: tuple[str, ...] = ()) -> set[str]:
    """Look at a file and its bases without making any of their values: that may run code.

    Args:
        path: of the file.
        above: the files of which it is a base, from the first on.

    Returns:
        see :func:`merge_file`.

    Raises:
        ValueError: see :func:`merge_file`.
    """
    title = f"_BASE_ {path} of {above[-1]}" if above else path
    if os.path.realpath(path) in map(os.path.realpath, above):
        raise ValueError(
            f"{title}: the files are bases of each other in a circle "
            f"({' -> '.join((*above, path))}); expected a chain of _BASE_ that ends."
        )
    try:
        with PathManager.open(path, "r") as file:
            # Nodes alone: keys and the text of their values.
            root = yaml.compose(file, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ValueError(
            f"{title} cannot be opened ({error.strerror or error}); expected a .yaml file; a "
            "_BASE_ is relative to the folder of the file that names it."
        ) from error
    if not isinstance(root, yaml.MappingNode):
        found = "is empty" if root is None else f"holds a {root.id} of YAML"
        raise ValueError(f"{title} {found}; expected keys and values, such as MODEL: {{...}}.")
    _refuse_equal_keys(root, title)
    shipped = any(_is_in(path, folder) for folder in _SHIPPED)
    keys = set() if shipped else set(_keys_of(root))
    for key, value in root.value:
        if key.value == BASE_KEY:
            for base in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                keys |= _check_files(_base_path(str(base.value), path), (*above, path))
    return keys


def _keys_of(node: yaml.MappingNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.value:
        yield f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode):
            yield from _keys_of(value, f"{prefix}{key.value}.")


def _refuse_equal_keys(root: yaml.Node, title: str) -> None:
    """Refuse two equal keys of one mapping, anywhere in a file: YAML keeps the last in silence.

    An anchor and its aliases are one node. ``<<`` may stand several times: YAML merges all.
    """
    nodes: list[tuple[str, yaml.Node]] = [("", root)]
    seen: set[int] = set()
    while nodes:
        path, node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += [(f"{path}[{i}]", item) for i, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], int] = {}
            for key, value in node.value:
                name = f"{path}.{key.value}" if path else str(key.value)
                nodes.append((name, value))
                line, same = key.start_mark.line + 1, (key.tag, str(key.value))
                if same in lines and key.value != "<<":
                    raise ValueError(
                        f"{title} has the key {name} twice, in lines {lines[same]} and {line}, of "
                        "which YAML takes the last alone; expected one. Merge the two."
                    )
                lines[same] = line


def _base_path(base: str, path: str) -> str:
    """Where a base lies, as Detectron2 looks for it."""
    base = os.path.expanduser(base)
    if base.startswith(("/", "https://", "http://")):
        return base
    return os.path.join(os.path.dirname(path), base)
