"""The source of a teacher: its config, how it is built, and the place of its weights."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..checkpoint import load_strictly, local_file, read_weights, sha256_of
from ..config import add_distill_config, add_shared_keys, student_config
from ..config_files import is_lazy, is_saved_lazy_config, load_lazy_file, may_run, merge_file
from ..sharing import without_queries
from ..yaml_files import dotted
from .external_teacher import is_rtdetr, load_rtdetr, rtdetr_weights
from .saved_lazy import IMAGE_FORMAT, check_parts, read_saved_model, targets_of
from .teacher_files import KEY, RUN_CONFIG, TeacherNotFoundError, find_teacher, is_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherSource:
    """A teacher that can be built.

    Attributes:
        name: as the user gave it, for messages.
        weights: a file or URL.
        build: makes the detector, with random weights, on a device.
        input_format: the channel order that it was trained on; "" for ``input_format`` of the
            detector, or BGR if it has none.
        cfg: its config if that is a YAML, frozen; its ``MODEL.WEIGHTS`` are the teacher's.
        read: makes the detector with its weights, if they are not in Detectron2's format.
    """

    name: str
    weights: str
    build: Callable[[str], nn.Module]
    input_format: str = ""
    cfg: CfgNode | None = None
    read: Callable[[], nn.Module] | None = None

    def structure(self) -> nn.Module:
        """The detector without weights: shapes only, if its modules allow that.

        Raises:
            ValueError: it cannot be built.
        """
        try:
            with torch.device("meta"):
                return self.build("meta")
        except Exception:  # a module that computes with its tensors while it is built
            return self._built()

    def load(self, strict_prefix: str = "") -> tuple[nn.Module, str]:
        """The whole detector with its weights, on the CPU, and their SHA-256.

        Args:
            strict_prefix: of the keys that must fit; "" for all.

        Raises:
            ValueError: it cannot be built, or what :func:`load_strictly` raises.
        """
        key = "MODEL.DISTILL.TEACHER.WEIGHTS"
        model: Any
        if self.read is not None:
            sha256 = sha256_of(local_file(self.weights, key=key))
            model = self.read()
        else:
            weights = read_weights(self.weights, key=key)
            sha256, model = weights.sha256, self._built()
            unfit = load_strictly(model, weights, feature_path=strict_prefix)
            if unfit:
                logger.warning(
                    "The teacher's heads do not fit its config (%d keys, e.g. %s). Only its "
                    "features are used, which fit. --eval-teacher would refuse it.",
                    *(len(unfit), unfit[0]),
                )
        logger.info(
            "Teacher: %s, %.1fM parameters on its feature path, weights %s (sha256 %s)",
            type(model).__name__,
            sum(p.numel() for p in model.backbone.parameters()) / 1e6,
            *(without_queries(self.weights), sha256[:12]),
        )
        return model, sha256

    def _built(self) -> nn.Module:
        try:
            # The teacher is built when it is first used: what is drawn for its weights, which are
            # then replaced, may not shift the random numbers that the student trains with.
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                return self.build("cpu")
        except Exception as error:
            raise ValueError(
                f"The teacher cannot be built from {KEY} {self.name!r} with its OPTS: "
                f"{type(error).__name__}: {error}"
            ) from error


def teacher_source(cfg: CfgNode) -> TeacherSource:
    """The teacher of ``MODEL.DISTILL.TEACHER``.

    Raises:
        TeacherNotFoundError: its config is not there.
        ValueError: its weights are not, or its config is not readable.
    """
    node = cfg.MODEL.DISTILL.TEACHER
    return source_of(teacher_name(cfg), node.WEIGHTS, list(node.OPTS), student=cfg)


def teacher_name(cfg: CfgNode) -> str:
    """``TEACHER.NAME``, or ``TEACHER.CONFIG_FILE``, which is its former name.

    Raises:
        ValueError: both are set, to different values.
    """
    node = cfg.MODEL.DISTILL.TEACHER
    if node.NAME and node.CONFIG_FILE and node.NAME != node.CONFIG_FILE:
        raise ValueError(
            f"{KEY} is {node.NAME!r}, and MODEL.DISTILL.TEACHER.CONFIG_FILE, its former name, "
            f"{node.CONFIG_FILE!r}; expected one of them. Leave CONFIG_FILE ''."
        )
    return str(node.NAME or node.CONFIG_FILE)


def source_of(
    name: str, weights: str = "", opts: Sequence[Any] = (), *, student: CfgNode | None = None
) -> TeacherSource:
    """As :func:`teacher_source`, for the values of NAME, WEIGHTS and OPTS.

    Args:
        student: the student's config, that the values come from. Custom keys that neither the
            teacher's file nor a default gives have its values. None: code gives the values, which
            may name a .py and what a LazyConfig calls.
    """
    if is_rtdetr(name) and not is_file(os.path.join(os.path.expanduser(name), RUN_CONFIG)):
        return _rtdetr_source(name, weights, opts)
    path, weights = find_teacher(name, weights)
    if student is not None and is_lazy(path) and not may_run(path, name):
        raise TeacherNotFoundError(
            f"{KEY} is {name!r}, a program, which a config may not have run; expected it as "
            "--teacher or KEY VALUE on the command line, or FrozenTeacher.load_from in a .py."
        )
    try:
        if is_lazy(path) or is_saved_lazy_config(path):
            return _lazy_source(name, path, weights, opts, by_code=student is None)
        config = _yaml_config(path, weights, opts, student)
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"{KEY} {name!r} asks to run code ({error.problem}), which is refused; expected plain "
            "values, or the .py file of its training, if you trust it, as --teacher."
        ) from error
    except Exception as error:
        raise ValueError(
            f"The teacher's config is not readable: {KEY} {name!r} with OPTS {list(opts)}: {error}"
        ) from error
    return TeacherSource(name, weights, partial(_build_yaml, config), config.INPUT.FORMAT, config)


def _yaml_config(path: str, weights: str, opts: Sequence[Any], student: CfgNode | None) -> CfgNode:
    teacher = get_cfg()
    add_distill_config(teacher)
    add_shared_keys(teacher)
    known = dict(dotted(teacher)) | dict(dotted(student or {}))
    # Allow unknown keys: the config may come from another Detectron2 version or project.
    teacher.set_new_allowed(True)
    merge_file(teacher, path)
    found = [key for key, _ in dotted(teacher) if not key.startswith("MODEL.DISTILL.")]
    unknown = [key for key in found if key not in known]
    missing = _fill(teacher, student or {})
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
    return load_rtdetr(name, weights=False).to(device)


def _fill(node: CfgNode, other: Mapping[str, Any], prefix: str = "") -> list[str]:
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


def _lazy_source(
    name: str, path: str, weights: str, opts: Sequence[Any], *, by_code: bool
) -> TeacherSource:
    """Of a .py, which has been run, or of a saved LazyConfig, which names parts of detectors."""
    config = load_lazy_file(path) if is_lazy(path) else read_saved_model(path)
    if "model" not in config:
        raise ValueError("it has no 'model'")
    known = list(targets_of(_student_of(config))) if is_lazy(path) else []
    config = LazyConfig.apply_overrides(config, [str(x) for x in opts])
    node = _student_of(config)
    if not (by_code and is_lazy(path)):
        check_parts(node, known)
    # What it was trained on; its model may not say so.
    image_format = OmegaConf.select(config, IMAGE_FORMAT, throw_on_resolution_failure=False)
    return TeacherSource(name, weights, partial(_build_lazy, node), image_format or "")


def _student_of(config: DictConfig) -> DictConfig:
    # A LazyConfig student that was distilled: its student is the teacher.
    node: DictConfig = config.model.get("student", config.model)
    return node


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
