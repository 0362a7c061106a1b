"""Sets of json files: each is read, inspected and turned into records once in a process."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..coco import is_coco_instances, own_json_file
from ..json_file import file_stamp, no_garbage_collection, no_list, read_instances
from ..needs import Needs
from ..records import Records, records_of
from .coco_file import inspect_coco
from .findings import Findings

# Types of data sets that Detectron2 reads and scores as COCO's; LVIS has other keys.
COCO_KINDS = ("coco", "coco_panoptic_seg")
# Sets whose records are kept in memory until they are trained on.
_KEPT = 8

_CACHE: dict[tuple[Any, ...], tuple[Any, "JsonSet"]] = {}


@dataclass(frozen=True)
class JsonSet:
    """What a json file holds.

    Attributes:
        findings: what the inspection found.
        categories: id and name of each class, by id.
        records: None for a file with faults, and for readers other than that of COCO's format.
    """

    findings: Findings
    categories: Sequence[tuple[Any, str]]
    records: Records | None


def load_json_set(where: str, name: str, needs: Needs | None, *, annotated: bool) -> JsonSet:
    """Read the json file of a registered set, unless this process has done so before.

    Args:
        where: names the set in messages.
        name: of a set whose records are what its json file holds.
        needs: of the student; None takes what is there.
        annotated: whether annotations are needed.

    Raises:
        ValueError: as :func:`read_instances`.
    """
    meta = MetadataCatalog.get(name)
    json_file, root = own_json_file(name), str(meta.get("image_root", ""))
    kind = meta.get("evaluator_type", "coco")
    is_coco = is_coco_instances(name) and kind in COCO_KINDS
    key = (name, json_file, *file_stamp(PathManager.get_local_path(json_file)), root, kind, is_coco)
    ours = needs or Needs()
    asked = (ours.masks, ours.mask_format, ours.keypoints, ours.least_keypoints)
    kept = _CACHE.get(key)
    if kept is None or (needs is not None and asked != kept[0]):
        while len(_CACHE) >= _KEPT:
            _CACHE.pop(next(iter(_CACHE)))
        with no_garbage_collection():
            content = read_instances(where, json_file, annotated=annotated)
            found = _inspect(content, name, ours, kind=kind, is_coco=is_coco)
        kept = _CACHE[key] = asked, found
    if annotated and not kept[1].findings.scored:
        raise no_list(where, json_file, "annotations")
    return kept[1]


def _inspect(
    content: dict[str, Any], name: str, needs: Needs, *, kind: str, is_coco: bool
) -> JsonSet:
    # Detectron2 admits these files' double ids as well.
    unique = "minival" not in own_json_file(name)
    findings = inspect_coco(content, needs, unique_annotations=unique, coco=kind in COCO_KINDS)
    if findings.problems:
        return JsonSet(findings, (), None)
    categories = sorted(((c["id"], c["name"]) for c in content["categories"]), key=lambda c: c[0])
    root = str(MetadataCatalog.get(name).get("image_root", ""))
    records = records_of(content, root, name, zero_area=findings.zero_area) if is_coco else None
    return JsonSet(findings, categories, records)
