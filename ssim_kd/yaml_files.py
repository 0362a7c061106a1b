"""Reads YAML config files with their bases: each once, what is merged is what was checked."""

import difflib
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2 import model_zoo
from detectron2.utils.file_io import PathManager
from fvcore.common.config import BASE_KEY

from .writing import folder_of, is_remote

#: The configs of Detectron2's model zoo.
ZOO = os.path.join(os.path.dirname(model_zoo.__file__), "configs")
_PACKAGE = os.path.dirname(os.path.abspath(__file__))
# An installed ssim_kd has its configs inside, a checkout next to it.
_SHIPPED = (*(os.path.join(f, "configs") for f in (_PACKAGE, os.path.dirname(_PACKAGE))), ZOO)
# Those of a method are in its folder: METHOD/configs.
_METHODS = tuple(os.path.join(f, "projects") for f in (_PACKAGE, os.path.dirname(_PACKAGE)))
# Values of a file may be so many by its aliases; without them, as many as it has.
_MOST_BY_ALIASES = 100_000


def shipped(name: str) -> str | None:
    """A config file that ssim_kd or Detectron2's model zoo ships, by its path there.

    One of a method has the name METHOD/FILE: "PKD/pkd_retinanet_R_50_FPN_1x.yaml".
    """
    method, _, file = name.partition("/")
    paths = [os.path.join(folder, name) for folder in _SHIPPED]
    paths += [os.path.join(folder, method, "configs", file) for folder in _METHODS if file]
    return next((path for path in paths if os.path.isfile(path)), None)


def near_shipped(name: str, folders: Sequence[str] = _SHIPPED) -> str:
    """Names of shipped configs that are like one that is not there, for the end of a message."""
    files = [(folder, path) for folder in folders for path in Path(folder).rglob("*.*")]
    known = {str(path.relative_to(f)) for f, path in files if path.suffix in (".yaml", ".py")}
    if folders is _SHIPPED:
        of_methods = [path for folder in _METHODS for path in Path(folder).glob("*/configs/*.*")]
        known |= {f"{path.parts[-3]}/{path.name}" for path in of_methods}
    near = difflib.get_close_matches(name, sorted(known), n=2, cutoff=0.8)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def read_with_bases(path: str, above: tuple[str, ...] = ()) -> tuple[dict[str, Any], set[str]]:
    """Read a config file that may not run code; its bases out of Detectron2's zoo may.

    Those come with Detectron2, and its RetinaNets compute their anchors so.

    Args:
        path: of the file.
        above: the files of which it is a base, from the first on.

    Returns:
        its keys merged into those of its bases, and the dotted names of all that are set by files
        that neither ssim_kd nor the zoo ships.

    Raises:
        ValueError: a file or base that cannot be opened or holds no keys; a mapping with a key
            twice, of which YAML would take the last only; bases in a circle; a value that cannot
            be read; too many values by aliases of aliases.
        yaml.YAMLError: a file that is not YAML, or a custom one that asks to run code.
    """
    title = f"_BASE_ {path} of {above[-1]}" if above else path
    if os.path.realpath(path) in map(os.path.realpath, above):
        raise ValueError(
            f"{title}: the files are bases of each other in a circle "
            f"({' -> '.join((*above, path))}); expected a chain of _BASE_ that ends."
        )
    own = _read(path, title)
    _rename(own)
    bases = own.pop(BASE_KEY, [])
    keys = set() if is_shipped(path) else set(dict(dotted(own)))
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        found, set_there = read_with_bases(_base_path(str(base or ""), path), (*above, path))
        merged = _merged(found, merged, title)
        keys |= set_there
    return _merged(own, merged, title), keys


def dotted(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted names of the values of a nested config, and the values."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def name_of(value: Any) -> str:
    """A value as text; functions and classes by name: their text has an address."""
    if inspect.isroutine(value) or inspect.isclass(value):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)


def _rename(own: dict[str, Any]) -> None:
    """Give keys of a file their names of now; a base may have these."""
    node: Any = own
    for section in ("MODEL", "DISTILL", "TEACHER"):
        node = node.get(section) if isinstance(node, dict) else None
    if isinstance(node, dict) and "CONFIG_FILE" in node and not node.get("NAME"):
        node["NAME"] = node.pop("CONFIG_FILE")


def _read(path: str, title: str) -> dict[str, Any]:
    kind = yaml.UnsafeLoader if _is_in(path, ZOO) else yaml.SafeLoader
    try:
        with PathManager.open(path, "r") as file:
            loader = kind(file)
            try:
                # Nodes: keys and the text of their values, of which none is made yet.
                root = loader.get_single_node()
                _check(root, title)
                found: dict[str, Any] = loader.construct_document(root)
            finally:
                loader.dispose()
    except OSError as error:
        raise ValueError(
            f"{title} cannot be opened ({error.strerror or error}); expected a .yaml file; a "
            "_BASE_ is relative to the folder of the file that names it, or the name of a config "
            "of ssim_kd or of Detectron2's model zoo."
        ) from error
    except RecursionError as error:
        raise ValueError(f"{title} is nested too deeply; expected a config file.") from error
    except ValueError as error:
        # Text that is not UTF-8, a number of 5,000 digits.
        raise error if title in str(error) else ValueError(f"{title}: {error}") from error
    return found


def _check(root: yaml.Node | None, title: str) -> None:
    if not isinstance(root, yaml.MappingNode):
        found = "is empty" if root is None else f"holds a {root.id} of YAML"
        raise ValueError(f"{title} {found}; expected keys and values, such as MODEL: {{...}}.")
    refuse_aliases_of_aliases(root, title)
    _refuse_equal_keys(root, title)


def refuse_aliases_of_aliases(root: yaml.Node, title: str) -> None:
    """Raise ValueError if aliases make a file of few values too large or endless."""
    sizes: dict[int, int] = {}
    total = _size(root, sizes, title)
    if total > len(sizes) + _MOST_BY_ALIASES:
        raise ValueError(
            f"{title} holds more than {_MOST_BY_ALIASES} values by aliases of aliases; expected "
            "fewer. Write them out."
        )


def _size(node: yaml.Node, sizes: dict[int, int], title: str) -> int:
    """How many values a node holds, those of aliases each time; ``sizes`` keeps what is known."""
    if id(node) not in sizes:
        sizes[id(node)] = 0
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        pairs = isinstance(node, yaml.MappingNode)
        inner = [part for pair in parts for part in pair] if pairs else parts
        sizes[id(node)] = 1 + sum(_size(part, sizes, title) for part in inner)
    elif not sizes[id(node)]:
        raise ValueError(f"{title} holds an alias of what it is in; expected values that end.")
    return sizes[id(node)]


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
                        "which YAML takes only the last; expected one. Merge the two."
                    )
                lines[same] = line


def _merged(over: dict[str, Any], base: dict[str, Any], title: str) -> dict[str, Any]:
    """New dicts: an alias makes two keys one object, of which only one may be meant."""
    found = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and key in base:
            if not isinstance(base[key], dict):
                raise ValueError(f"{title}: {key} is {base[key]!r} in its _BASE_; expected keys.")
            found[key] = _merged(value, base[key], title)
        else:
            found[key] = value
    return found


def is_shipped(path: str) -> bool:
    """Whether a config file came with ssim_kd or Detectron2's model zoo."""
    return any(_is_in(path, folder) for folder in _SHIPPED)


def _is_in(path: str, folder: str) -> bool:
    return os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), ""))


def _base_path(base: str, path: str) -> str:
    """The path of a base, as Detectron2 finds it; else the shipped config of that name."""
    base = os.path.expanduser(base)
    if os.path.isabs(base) or is_remote(base):
        return base
    found = os.path.join(folder_of(path), base)
    return found if PathManager.exists(found) else shipped(base) or found
