"""Finds and merges config files, and tells what a misspelt key may mean."""

import copy
import difflib
import functools
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode as CN
from detectron2.config import LazyConfig, downgrade_config, upgrade_config
from detectron2.config.compat import guess_version
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig

from .yaml_files import dotted, is_shipped, near_shipped, read_with_bases, shipped


def find_config_file(name: str) -> str:
    """A config file; or one that ssim_kd or Detectron2's model zoo ships, by its path there.

    "COCO-Detection/ssim_retinanet_R_50_FPN_1x.yaml" needs no checkout.
    """
    if not name or PathManager.exists(name):
        return name
    return shipped(name) or name


@dataclass(frozen=True)
class Loaded:
    """What a command line comes to.

    Attributes:
        cfg: a YAML config, frozen, or a LazyConfig.
        config_file: the path of the file; "" for none.
        notes: what arguments have set, a line each, for the log.
    """

    cfg: Any
    config_file: str
    notes: list[str]


def find_file(name: str) -> str:
    """The path of ``--config-file``; "" for none.

    Raises:
        ValueError: it is not there.
    """
    path = find_config_file(os.path.expanduser(name))
    if path and not PathManager.exists(path):
        raise ValueError(
            f"--config-file is {name!r}, which cannot be opened: neither a file nor the name of a "
            f"config of ssim_kd or of Detectron2's model zoo{near_shipped(name)}."
        )
    return path


def beside(path: str, config_file: str) -> str:
    """A path that is not there may be relative to the folder of ``--config-file``."""
    near = os.path.join(os.path.dirname(config_file), path)
    return near if path and not os.path.exists(path) and os.path.exists(near) else path


def lacks_gpu(device: str) -> bool:
    """Whether this machine has no GPU that PyTorch can use, for a device that is one."""
    return device.startswith("cuda") and not torch.cuda.is_available()


def merge_file(cfg: CN, path: str) -> set[str]:
    """Merge a config file and its bases, see :func:`ssim_kd.yaml_files.read_with_bases`.

    Returns:
        the dotted names of the keys that the file and its bases set, without bases that ssim_kd or
        Detectron2's zoo ships.

    Raises:
        ValueError, yaml.YAMLError: what read_with_bases raises.
        others: as ``CfgNode.merge_from_file``.
    """
    found, keys = read_with_bases(path)
    loaded = type(cfg)(found)
    version = loaded.get("VERSION") or guess_version(loaded, path)
    if version == cfg.VERSION:
        cfg.merge_from_other_cfg(loaded)
        return keys
    # As CfgNode.merge_from_file, which would read the file again.
    old = downgrade_config(cfg, to_version=version)
    old.merge_from_other_cfg(loaded)
    new = upgrade_config(old)
    cfg.clear()
    cfg.update(new)
    return keys


def is_lazy(path: str) -> bool:
    """Whether a config file is a LazyConfig."""
    return path.endswith(".py")


def is_saved_lazy_config(path: str) -> bool:
    """Whether a .yaml is what ``LazyConfig.save`` leaves in the folder of a run."""
    with PathManager.open(path, "rb") as file:
        return {b"model"} == {*re.findall(rb"^(model)\b", file.read(), re.I | re.M)}


def load_lazy_file(path: str) -> DictConfig:
    """``LazyConfig.load``, which runs a file once in a process: it may register data sets.

    A file that has been written since is run again. A base of it that was is not noticed.
    """
    written = os.stat(path).st_mtime_ns if os.path.isfile(path) else 0
    return copy.deepcopy(_run_lazy_file(os.path.abspath(path) if written else path, written))


@functools.cache
def _run_lazy_file(path: str, written: int) -> DictConfig:
    return LazyConfig.load(path)


# Programs that a person has named, on the command line or in code.
_named: set[str] = set()


def allow_program(path: str) -> None:
    """Let configs name a .py file, which is run for them: a person has named it as well."""
    _named.add(os.path.realpath(path))


def may_run(path: str, name: str = "") -> bool:
    """Whether a .py that a config names may be run.

    Args:
        path: of the file.
        name: as the config has it.

    Returns:
        True if ssim_kd or Detectron2 ships it, the command line has that name, or code gave it to
        :func:`allow_program`.
    """
    return is_shipped(path) or name in sys.argv or os.path.realpath(path) in _named


def did_you_mean(cfg: Mapping[str, Any], message: str, more: Iterable[str] = ()) -> str:
    """What may be meant by the unknown key that a message of yacs ends with.

    Args:
        cfg: the config that lacks the key.
        message: "Non-existent config key: MODEL.DISTILL.LOS", say.
        more: keys that it may have in addition.

    Returns:
        " Did you mean MODEL.DISTILL.LOSS?"; "" if no key is like it.
    """
    key = message.rsplit(": ", 1)[-1].strip("'\" ")
    known = dict(dotted(cfg))
    sections = {name.rsplit(".", depth)[0] for name in known for depth in range(1, 6)}
    names = sorted({*known, *sections, *more})
    near = near_keys(key, names, most=2, cutoff=0.85)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def near_keys(key: str, known: Sequence[str], *, most: int, cutoff: float) -> list[str]:
    """The known keys that resemble one: those of its section, else any.

    Args:
        key: dotted.
        known: dotted.
        most: how many, at the most.
        cutoff: the least likeness, 0 to 1, see :func:`difflib.get_close_matches`.
    """
    # TEMPERATURE is a name of several sections.
    section = key.rpartition(".")[0]
    section_keys = [name for name in known if section and name.rpartition(".")[0] == section]
    return difflib.get_close_matches(key, section_keys, most, cutoff) or difflib.get_close_matches(
        key, known, most, cutoff
    )
