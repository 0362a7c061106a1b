"""From a config to distillers, and back: the methods' own values are written into the config."""

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from fvcore.common.param_scheduler import ParamScheduler
from torch import nn

from ...config_files import near_keys
from ...ops.options import check_choice
from ...yaml_files import dotted
from ..teacher import FrozenTeacher
from .base import DISTILLER_REGISTRY, Distiller

logger = logging.getLogger(__name__)

# What MODEL.DISTILL.LOSS chose, and still does in old configs.
_BY_LOSS = {"ssim": "SSIMDistiller", "l1": "L1Distiller", "l2": "L2Distiller"}
# The first word of a message, or a word in backticks: the name of an argument.
_ARGUMENT = re.compile(r"^([\w.]+)|`([\w.]+)`")


def build_distillers(cfg: CfgNode) -> list[Distiller]:
    """The terms of ``MODEL.DISTILL.TERMS``, or the single one of ``MODEL.DISTILL.NAME``.

    Raises:
        ValueError: an unknown distiller or key, or a value out of its range.
    """
    distillers: list[Distiller] = []
    for term in _terms(cfg):
        distiller = _build_distiller(cfg, term)
        names = [d.name for d in distillers]
        if distiller.name in names:
            number = 1 + sum(
                n == distiller.name or n.startswith(f"{distiller.name}_") for n in names
            )
            distiller.name = f"{distiller.name}_{number}"
        distillers.append(distiller)
    return distillers


def bind_distillers(
    distillers: Sequence[Distiller], student: nn.Module, teacher: FrozenTeacher
) -> None:
    """Bind distillers to a pair, and log the values that are the methods' own.

    Raises:
        ValueError: a pair that a distiller cannot serve.
    """
    for distiller in distillers:
        with naming_keys(distiller.key_names):
            distiller.resolve(student)
            distiller.bind(student, teacher)
            if distiller.balance is not None:
                distiller.balance.bind(student, distiller.student_taps)
        if distiller.own:
            own = ", ".join(
                f"{k} {'all' if v == [] else _short(v)}" for k, v in distiller.own.items()
            )
            logger.info("Distiller %s: the method's own are %s.", distiller.name, own)


def resolved_config(cfg: CfgNode, distillers: Sequence[Distiller]) -> CfgNode:
    """The config of bound distillers with the values that are the methods' own, frozen.

    Args:
        cfg: from which :func:`build_distillers` built them.
        distillers: bound; [] leaves the config as it is.
    """
    if not distillers:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    node, terms = cfg.MODEL.DISTILL, _terms(cfg)
    own = [
        [(d.all_keys()[k], _plain(v)) for k, v in d.own.items() if k in d.all_keys()]
        for d in distillers
    ]
    names = [_method(cfg, term[0]) for term in terms]
    if node.TERMS:
        node.TERMS = [
            [name, *term[1:], *(x for pair in pairs for x in pair)]
            for name, term, pairs in zip(names, terms, own, strict=True)
        ]
    else:
        (node.NAME,) = names
        cfg.merge_from_list([x for k, v in own[0] for x in (f"MODEL.DISTILL.{k}", v)])
    node.LOSS = ""
    cfg.freeze()
    return cfg


@contextlib.contextmanager
def naming_keys(names: Mapping[str, str]) -> Iterator[None]:
    """Give a ValueError the keys of the arguments that it names: {argument: key}.

    The errors of a distiller speak of its arguments: of the one in whose place the first word
    stands, and of those in backticks.
    """
    try:
        yield
    except ValueError as error:
        before = str(error)
        after = _ARGUMENT.sub(lambda found: names.get(found[1] or found[2], found[0]), before)
        if after == before:
            raise
        raise ValueError(after) from error


def _terms(cfg: CfgNode) -> list[list[Any]]:
    return [list(term) for term in cfg.MODEL.DISTILL.TERMS] or [[cfg.MODEL.DISTILL.NAME]]


def _build_distiller(cfg: CfgNode, term: list[Any]) -> Distiller:
    title = "MODEL.DISTILL.TERMS" if cfg.MODEL.DISTILL.TERMS else "MODEL.DISTILL.NAME"
    if len(term) != 1:
        cfg = cfg.clone()
        cfg.defrost()
        _override(cfg, term)
    name = _method(cfg, term[0])
    if name not in DISTILLER_REGISTRY:
        known = sorted(name for name, _ in DISTILLER_REGISTRY)
        raise ValueError(f"{title}: {name!r} is not a distiller; {_expected(name, known)}")
    method = DISTILLER_REGISTRY.get(name)
    names = {}
    if isinstance(method, type) and issubclass(method, Distiller):
        for argument, key in method.all_keys().items():
            # The options of a loss are named without the argument that holds them.
            names[argument] = names[argument.rpartition(".")[2]] = f"MODEL.DISTILL.{key}"
    with naming_keys(names):
        distiller: Distiller = method(cfg)
    distiller.key_names = names
    return distiller


def _method(cfg: CfgNode, name: str) -> str:
    """The name in the registry that NAME, or the name of a term, and LOSS stand for."""
    allowed = {"": _BY_LOSS, "FeatureDistiller": _BY_LOSS, "LpDistiller": ("l1", "l2")}.get(name)
    if allowed is None:
        return name
    loss = cfg.MODEL.DISTILL.LOSS or ("l2" if name == "LpDistiller" else "ssim")
    check_choice("MODEL.DISTILL.LOSS", loss, tuple(allowed))
    return _BY_LOSS[loss]


def _override(cfg: CfgNode, term: list[Any]) -> None:
    """Apply ["Name", KEY, VALUE, ...] to ``MODEL.DISTILL``."""
    keys, values = term[1::2], term[2::2]
    if not term or len(keys) != len(values):
        raise ValueError(f"MODEL.DISTILL.TERMS: {term} is not a name with KEY, VALUE pairs.")
    for key, value in zip(keys, values, strict=True):
        node, known = cfg.MODEL.DISTILL, True
        for part in str(key).split("."):
            known = isinstance(node, CfgNode) and part in node
            if not known:
                break
            node = node[part]
        if not known or isinstance(node, CfgNode) or key in ("TERMS", "NAME", "ENABLED"):
            raise ValueError(
                f"MODEL.DISTILL.TERMS: {key!r} in {term} is not a key of a distiller; "
                f"{_expected(str(key), [name for name, _ in dotted(cfg.MODEL.DISTILL)])}"
            )
        if key == "LOSS_WEIGHT":  # a number or "auto"
            cfg.MODEL.DISTILL.LOSS_WEIGHT = None
        try:
            cfg.merge_from_list([f"MODEL.DISTILL.{key}", value])
        except (ValueError, AssertionError) as error:
            raise ValueError(f"MODEL.DISTILL.TERMS: {key} in {term}: {error}") from error


def _expected(name: object, known: list[str]) -> str:
    near = near_keys(str(name), known, most=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"expected one of {known}."


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(_plain(value)) if not isinstance(value, ParamScheduler) else type(value).__name__
