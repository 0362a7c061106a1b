"""The config that a run was started with, kept in its checkpoints and compared on resume."""

import json
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode

# Where a run lies is no matter of what it does.
_LEFT_OUT = ("OUTPUT_DIR",)


def settings_of(cfg: CfgNode) -> str:
    """Every key and value of a config, as JSON that :func:`differences` reads."""
    return json.dumps(dict(_leaves(cfg)), sort_keys=True, default=str)


def differences(ours: str, theirs: str) -> list[str]:
    """What two texts of :func:`settings_of` differ in.

    Returns:
        a line for each key: "KEY: value in ``ours`` (was: value in ``theirs``)".
    """
    now, was = json.loads(ours), json.loads(theirs)
    return [
        f"{key}: {now.get(key, 'no such key')} (was: {was.get(key, 'no such key')})"
        for key in sorted(now.keys() | was.keys())
        if now.get(key) != was.get(key)
    ]


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{key}.")
        elif prefix + key not in _LEFT_OUT:
            yield prefix + key, value
