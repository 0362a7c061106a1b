"""COCO data sets of the config: ``DATASETS.REGISTER_COCO`` and ``DATASETS.ZERO_AREA_BOXES``."""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode

from .json_file import no_garbage_collection
from .records import Records

logger = logging.getLogger(__name__)

# Detectron2's mapper leaves out boxes whose sides are not longer than this (pixels).
LEAST_SIDE = 1e-5
# Modules whose readers take all from the json file of the metadata.
_COCO_READERS = ("detectron2.data.datasets.coco", "ssim_kd.data.digits.dataset")
_JSON_READERS = (
    *_COCO_READERS,
    "detectron2.data.datasets.coco_panoptic",
    "detectron2.data.datasets.lvis",
)

# What this process has registered: name -> (json file, image folder).
_REGISTERED: dict[str, tuple[str, str]] = {}
# The file that describes a set, if not the config: (name, json file) -> "entry 'val' of data.yaml".
_SOURCES: dict[tuple[str, str], str] = {}


def register_coco(cfg: CfgNode) -> None:
    """Register every entry of ``cfg.DATASETS.REGISTER_COCO``: [name, json file, image folder].

    Nothing is read yet. Registering the same entry again only clears what its file
    said; one that was registered here with other paths is replaced.

    Raises:
        ValueError: an entry is malformed, a name appears twice with different paths, or another
            package has registered the name.
    """
    wanted: dict[str, tuple[str, str]] = {}
    for position, entry in enumerate(cfg.DATASETS.REGISTER_COCO):
        name, json_file, image_root = _parse(position, entry)
        if wanted.setdefault(name, (json_file, image_root)) != (json_file, image_root):
            raise ValueError(
                f"DATASETS.REGISTER_COCO names {name!r} twice, with different paths: "
                f"{wanted[name]} and {(json_file, image_root)}. Give each data set its own name."
            )
    for name, paths in wanted.items():
        if name in DatasetCatalog:
            if name not in _REGISTERED:
                raise ValueError(
                    f"DATASETS.REGISTER_COCO: the name {name!r} is taken by a data set that "
                    "Detectron2 or another package has registered. Choose another name."
                )
            if _REGISTERED[name] == paths:
                # Detectron2's reader sets these, and fails if the file has other classes by now.
                for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
                    MetadataCatalog.get(name).__dict__.pop(key, None)
                continue
            DatasetCatalog.pop(name)
            MetadataCatalog.pop(name, None)
        register_coco_instances(name, {}, *paths)
        _REGISTERED[name] = paths


def reads_json_file(name: str) -> bool:
    """Whether a set's records are what Detectron2's reader makes of its ``json_file``."""
    return bool(MetadataCatalog.get(name).get("json_file")) and _reader(name) in _JSON_READERS


def is_coco_instances(name: str) -> bool:
    """Whether a set's reader is that of ``register_coco_instances``, or of the digits."""
    return _reader(name) in _COCO_READERS


def _reader(name: str) -> str:
    """The module of a set's reader; "" if it is not registered."""
    reader = DatasetCatalog[name] if name in DatasetCatalog else None  # noqa: SIM401
    return getattr(reader, "__module__", None) or ""


def own_json_file(name: str) -> str:
    """Return the ``json_file`` of a set's metadata; empty if it has none.

    Detectron2's COCOEvaluator writes one for a set of records, and keeps its path: it is
    stale as soon as the records change, and gone with that run's folder.
    """
    path: str = MetadataCatalog.get(name).get("json_file") or ""
    converted = os.path.basename(path) == f"{name}_coco_format.json"
    return "" if converted and not reads_json_file(name) else path


def annotation_files(name: str) -> list[str]:
    """The json file and the image folder of a registered set in COCO format; [] for another."""
    meta = MetadataCatalog.get(name) if name in DatasetCatalog else None
    if meta is None or not own_json_file(name) or meta.get("evaluator_type") != "coco":
        return []
    return [own_json_file(name), str(meta.get("image_root", ""))]


@contextlib.contextmanager
def loading(where: str) -> Iterator[None]:
    """Turn what goes wrong while records are loaded into an error that names the set.

    Raises:
        ValueError: begins with ``where``; the cause is attached.
    """
    try:
        with no_garbage_collection():
            yield
    except Exception as error:
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where}: it cannot be loaded: {error!r}.") from error


def note_source(name: str, json_file: str, source: str) -> None:
    """Note what describes an entry of ``DATASETS.REGISTER_COCO``, for :func:`source_of_set`."""
    _SOURCES[name, json_file] = source


def source_of_set(name: str) -> str:
    """The place to correct the paths of a data set; "" if it is not registered here."""
    if name not in _REGISTERED:
        return ""
    default = "DATASETS.REGISTER_COCO (relative to the working directory)"
    return _SOURCES.get((name, _REGISTERED[name][0]), default)


def _parse(position: int, entry: Any) -> tuple[str, str, str]:
    valid = (
        isinstance(entry, Sequence)
        and not isinstance(entry, str)
        and len(entry) == 3
        and all(isinstance(part, str) and part for part in entry)
    )
    if not valid:
        raise ValueError(
            f"DATASETS.REGISTER_COCO[{position}] is {entry!r}: expected "
            "[name, json file, image folder], three non-empty strings."
        )
    name, json_file, image_root = entry
    return name, os.path.expanduser(json_file), os.path.expanduser(image_root)


def drop_zero_area_boxes(
    records: Sequence[dict[str, Any]], *, drop_emptied: bool
) -> Sequence[dict[str, Any]]:
    """Return the records without the boxes that have zero area or lie outside their image.

    Detectron2's mapper leaves such boxes out as well, but only after images without boxes have
    been filtered and classes have been counted. Crowd regions are kept.

    Args:
        records: in Detectron2's format; not changed.
        drop_emptied: also leave out images that lose their last box.
    """
    if isinstance(records, Records) and not records.zero_area:
        return records
    kept, boxes, images = [], 0, 0
    for record in records:
        before = record.get("annotations", [])
        annotations = [a for a in before if _has_area(a, record)]
        if len(annotations) < len(before):
            boxes += len(before) - len(annotations)
            if drop_emptied and all(a.get("iscrowd", 0) for a in annotations):
                images += 1
                continue
            record = {**record, "annotations": annotations}
        kept.append(record)
    if boxes:
        logger.warning("Left out %d boxes of zero area, and %d images with them.", boxes, images)
    if not kept:
        raise ValueError("No image is left: every box of the training sets has zero area.")
    return kept


def _has_area(annotation: dict[str, Any], record: dict[str, Any]) -> bool:
    if annotation.get("iscrowd", 0) or annotation.get("bbox_mode") != BoxMode.XYWH_ABS:
        return True
    try:
        x, y, width, height = annotation["bbox"]
        across = min(x + width, record["width"]) - max(x, 0)
        down = min(y + height, record["height"]) - max(y, 0)
        return bool(min(across, down) > LEAST_SIDE)
    except (KeyError, TypeError, ValueError):  # the size is not known, or a later check names it
        return True
