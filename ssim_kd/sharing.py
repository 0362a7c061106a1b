"""What is passed on, such as config.yaml and checkpoints, does not hold the keys of signed URLs."""

import copy
import re
from typing import Any

from detectron2.config import CfgNode
from omegaconf import DictConfig, ListConfig, OmegaConf

# A URL up to its query: scheme, user and password, the rest; then the query and fragment.
_URL = re.compile(
    r"""(?<![\w+.-])([a-z][\w+.-]*://)([^/\s"'?#@]*@)?([^\s"'?#]*)([?#][^\s"']*)?""", re.IGNORECASE
)
# An option of Detectron2, not of the host.
_OPTION = "matching_heuristics=True"


def without_queries(value: Any) -> Any:
    """A copy without query, user and password of the URLs in it, which may be signed.

    Args:
        value: text, and nested containers of any values: a config, an argparse.Namespace's dict.

    Example:
        >>> without_queries({"WEIGHTS": "https://me:x@host/t.pth?sig=abc"})
        {'WEIGHTS': 'https://host/t.pth'}
    """
    if isinstance(value, str):
        return _URL.sub(_stripped, value) if "://" in value else value
    if isinstance(value, DictConfig | ListConfig):
        found = copy.deepcopy(value)
        _strip(found)
        return found
    if isinstance(value, CfgNode):
        node = value.clone()
        node.defrost()
        for key, item in value.items():
            node[key] = without_queries(item)
        if value.is_frozen():
            node.freeze()
        return node
    if type(value) is dict:
        return {key: without_queries(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(without_queries(item) for item in value)
    return value


def _stripped(match: re.Match[str]) -> str:
    scheme, _, rest, query = match.groups()
    option = f"?{_OPTION}" if query and _OPTION in re.split("[?&#]", query) else ""
    return f"{scheme}{rest}{option}"


def _strip(node: Any) -> None:
    keys: Any = node if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        if isinstance(node[key], DictConfig | ListConfig):
            _strip(node[key])
        elif isinstance(node[key], str) and without_queries(node[key]) != node[key]:
            node[key] = without_queries(node[key])
