"""Where a teacher comes from: a name of the model zoo, a run, a config file or a checkpoint."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig
from torch import nn

from ..checkpoint import BEST
from ..config import add_distill_config, add_shared_keys, student_config
from ..config_files import is_lazy, is_saved_lazy_config, load_lazy_file, merge_file
from ..yaml_files import ZOO, near_shipped
from .external_teacher import build_rtdetr, is_rtdetr, load_rtdetr, rtdetr_weights

logger = logging.getLogger(__name__)

KEY = "MODEL.DISTILL.TEACHER.CONFIG_FILE"
EXPECTED = (
    "expected the folder of a run, a name of the model zoo (e.g. "
    "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml), a .yaml or .py file, a checkpoint with a "
    "config.yaml beside it, or an RT-DETR (hf://owner/name, or its folder)."
)
#: Weights that the folder of a run holds, the first that is there is taken.
RUN_WEIGHTS = ("model_final.pth", BEST, "model_final.pkl")
#: Configs that the folder of a run holds.
RUN_CONFIGS = ("config.yaml", "config.py")


class TeacherNotFoundError(ValueError):
    """The teacher's config is not on this machine; to evaluate the student it is not needed."""


@dataclass(frozen=True)
class TeacherSource:
    """A teacher that can be built.

    Attributes:
        name: as the user gave it, for messages.
        weights: a file or URL.
        build: makes the detector, with random weights, on a device.
        input_format: the channel order that it was trained on; "" for ``input_format`` of the
            detector, or BGR if it has none.
        cfg: its config where that is a YAML, else None.
        read: makes the detector with its weights, where they are not in Detectron2's format.
    """

    name: str
    weights: str
    build: Callable[[str], nn.Module]
    input_format: str = ""
    cfg: CfgNode | None = None
    read: Callable[[], nn.Module] | None = None


def find_teacher(name: str, weights: str = "") -> tuple[str, str]:
    """Resolve what a user calls a teacher.

    Args:
        name: the folder of a run, a name of the model zoo, a .yaml or .py file, or a checkpoint
            (.pth, .pkl) with the config of its run beside it.
        weights: a file, a URL or a name of the model zoo; "" for those that belong to ``name``.

    Returns:
        the config's path, and the weights' path or URL.

    Raises:
        TeacherNotFoundError: there is no such config.
        ValueError: there are no weights that belong to it.
    """
    if not name:
        raise TeacherNotFoundError(f"{KEY} is empty; {EXPECTED}")
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return _config_in(path, name), _weights_of(weights, path, name)
    if path.endswith((".pth", ".pkl")) and PathManager.isfile(path):
        return _config_in(os.path.dirname(path), name), _weights_of(weights or path, "", name)
    if PathManager.isfile(path):
        return path, _weights_of(weights, os.path.dirname(path), name)
    try:
        return str(model_zoo.get_config_file(name)), _weights_of(weights or name, "", name)
    except RuntimeError:
        raise TeacherNotFoundError(
            f"{KEY} is {name!r}: neither a file, a folder nor a name of the model zoo"
            f"{near_shipped(name, [ZOO])}; {EXPECTED}"
        ) from None


def _config_in(folder: str, name: str) -> str:
    for file in RUN_CONFIGS:
        if os.path.isfile(os.path.join(folder, file)):
            return os.path.join(folder, file)
    raise TeacherNotFoundError(
        f"{KEY} is {name!r}, but {folder or '.'} holds no {' or '.join(RUN_CONFIGS)}; {EXPECTED}"
    )


def _weights_of(weights: str, folder: str, name: str) -> str:
    """The weights that were named, or those in a folder, or the zoo's for a name."""
    if weights and not weights.endswith((".yaml", ".yml", ".py")):
        return os.path.expanduser(weights)
    try:
        return str(model_zoo.get_checkpoint_url(weights or name))
    except RuntimeError:
        pass
    found = [os.path.join(folder, file) for file in RUN_WEIGHTS] if not weights else []
    for path in found:
        if os.path.isfile(path):
            return path
    raise ValueError(
        f"MODEL.DISTILL.TEACHER.WEIGHTS is {weights!r}: the model zoo has no weights for "
        f"{weights or name!r}" + (f", and none of {found} is there" if found else "") + "; "
        "expected a .pth or .pkl file, a URL, or a name of the model zoo."
    )


def teacher_source(cfg: CfgNode) -> TeacherSource:
    """The teacher of ``MODEL.DISTILL.TEACHER``.

    Raises:
        TeacherNotFoundError: its config is not there.
        ValueError: its weights are not, or its config is not readable.
    """
    node = cfg.MODEL.DISTILL.TEACHER
    return source_of(node.CONFIG_FILE, node.WEIGHTS, list(node.OPTS), student=cfg)


def source_of(
    name: str, weights: str = "", opts: Sequence[Any] = (), *, student: CfgNode | None = None
) -> TeacherSource:
    """As :func:`teacher_source`, for the values of CONFIG_FILE, WEIGHTS and OPTS.

    Args:
        student: the student's config. Keys of the user's own that neither the teacher's file nor
            a default gives have its values.
    """
    run = any(os.path.isfile(os.path.join(os.path.expanduser(name), f)) for f in RUN_CONFIGS)
    if is_rtdetr(name) and not run:
        return _rtdetr_source(name, weights, opts)
    path, weights = find_teacher(name, weights)
    if not is_lazy(path) and is_saved_lazy_config(path):
        # It names what to call, anything at all: to read it would be to run code of a .yaml.
        raise ValueError(
            f"{KEY} (--teacher) is {name!r}: {path} was saved by the training of a LazyConfig and "
            f"is not read; expected the .py file of that training, and {weights} as "
            "MODEL.DISTILL.TEACHER.WEIGHTS."
        )
    try:
        if is_lazy(path):
            return _lazy_source(name, path, weights, opts)
        config = _yaml_config(path, weights, opts, student)
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"{KEY} {name!r} asks to run code ({error.problem}), which is refused; expected plain "
            "values."
        ) from error
    except Exception as error:
        raise ValueError(
            f"The teacher's config is not readable: {KEY} {name!r} with OPTS {list(opts)}: {error}"
        ) from error
    return TeacherSource(name, weights, partial(_build_yaml, config), config.INPUT.FORMAT, config)


def teacher_config(cfg: CfgNode) -> CfgNode:
    """The config of a YAML teacher, frozen; its ``MODEL.WEIGHTS`` are the teacher's.

    Raises:
        ValueError: as :func:`teacher_source`; or the teacher is a LazyConfig.
    """
    source = teacher_source(cfg)
    if source.cfg is None:
        raise ValueError(f"{KEY} is {source.name!r}, which is no YAML; expected one here.")
    return source.cfg


def _yaml_config(path: str, weights: str, opts: Sequence[Any], student: CfgNode | None) -> CfgNode:
    teacher = get_cfg()
    add_distill_config(teacher)
    add_shared_keys(teacher)
    known = set(_keys(teacher))
    # Keys of another Detectron2 or of another project: whoever reads them finds them.
    teacher.set_new_allowed(True)
    merge_file(teacher, path)
    unknown = [key for key in _keys(teacher) if key not in known]
    missing = _fill(teacher, student) if student is not None else []
    unknown = [key for key in unknown if not key.startswith("MODEL.DISTILL.")]
    if student is not None:
        unknown = [key for key in unknown if key not in set(_keys(student))]
    if unknown:
        logger.warning(
            "%s %s has keys that neither this Detectron2 nor ssim_kd knows; only code of yours "
            "can read them: %s.",
            *(KEY, path, ", ".join(unknown)),
        )
    if missing:
        logger.warning(
            "%s %s does not set %s: the student's values are used. Expected them in that file or "
            "in MODEL.DISTILL.TEACHER.OPTS.",
            *(KEY, path, ", ".join(missing)),
        )
    teacher.merge_from_list(list(opts))
    teacher.MODEL.WEIGHTS = weights
    teacher.MODEL.DEVICE = "cpu"
    return student_config(teacher)


# Functions, and no closures: a model with its teacher can be pickled.
def _build_yaml(config: CfgNode, device: str) -> nn.Module:
    placed = config.clone()
    placed.defrost()
    placed.MODEL.DEVICE = device
    return build_model(placed)


def _build_lazy(node: DictConfig, device: str) -> nn.Module:
    model: nn.Module = instantiate(node).to(device)
    return model


def _build_rtdetr(name: str, device: str) -> nn.Module:
    return build_rtdetr(name).to(device)


def _keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    """The dotted names of all values."""
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _fill(node: CfgNode, other: CfgNode, prefix: str = "") -> list[str]:
    """Add the keys of another config that are missing in this one; returns them."""
    added = []
    for key, value in other.items():
        name = prefix + key
        if name == "MODEL.DISTILL":
            continue
        if key not in node:
            node[key] = value.clone() if isinstance(value, CfgNode) else value
            added.append(name)
        elif isinstance(value, CfgNode) and isinstance(node[key], CfgNode):
            added += _fill(node[key], value, f"{name}.")
    return added


def _lazy_source(name: str, path: str, weights: str, opts: Sequence[Any]) -> TeacherSource:
    config = load_lazy_file(path)
    if "model" not in config:
        raise ValueError("it has no 'model'")
    config = LazyConfig.apply_overrides(config, [str(x) for x in opts])
    # A LazyConfig student that was distilled: its student is the teacher.
    node = config.model.get("student", config.model)
    return TeacherSource(name, weights, partial(_build_lazy, node))


def _rtdetr_source(name: str, weights: str, opts: Sequence[Any]) -> TeacherSource:
    if weights or opts:
        raise ValueError(
            f"{KEY} is {name!r}, a model of transformers, whose weights and config are its own; "
            f"expected MODEL.DISTILL.TEACHER.WEIGHTS '' and OPTS [], not {weights!r} and "
            f"{list(opts)}."
        )
    return TeacherSource(
        name,
        rtdetr_weights(name),
        partial(_build_rtdetr, name),
        read=partial(load_rtdetr, name),
    )
