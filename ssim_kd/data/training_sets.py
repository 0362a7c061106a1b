"""The records that trainings and evaluations load."""

import logging
from collections.abc import Sequence
from typing import Any

from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.build import print_instances_class_histogram
from detectron2.data.detection_utils import check_metadata_consistency
from detectron2.utils import comm

from .coco import drop_zero_area_boxes, is_coco_instances, loading
from .digits import ensure_digits
from .needs import Needs
from .proposals import add_proposals
from .records import Records, concatenate, shared
from .validation.json_sets import load_json_set

logger = logging.getLogger(__name__)


def train_records(
    names: str | Sequence[str],
    filter_empty: bool = True,
    min_keypoints: int = 0,
    proposal_files: Sequence[str] | None = None,
    check_consistency: bool = True,
    *,
    needs: Needs | None = None,
) -> Any:
    """Load training sets as Detectron2's ``get_detection_dataset_dicts`` does, same arguments.

    A json file in COCO's format is read once for all processes of a machine, each of which must
    call it.

    Args:
        names, filter_empty, min_keypoints, proposal_files, check_consistency: as there.
        needs: of the student. With them a file is read once for its check and its records; their
            ``zero_area`` "drop" leaves boxes out before images without boxes are.

    Returns:
        a sequence of records, or whatever the reader of a custom set returns.

    Raises:
        ValueError: a set cannot be loaded.
    """
    names = [names] if isinstance(names, str) else list(names)
    key = (needs or Needs()).key("DATASETS.TRAIN")
    where = f"{key}: data set {', '.join(map(repr, names))}"
    records: Any = None
    if proposal_files is None:
        records = _load(where, names, needs, check_consistency=check_consistency)
    if records is not None:
        records = _filtered(where, records, filter_empty, min_keypoints)
    else:
        records = _load_dicts(
            where,
            names,
            proposal_files,
            filter_empty=filter_empty,
            min_keypoints=min_keypoints,
            check_consistency=check_consistency,
        )
    if needs is not None and needs.zero_area == "drop" and isinstance(records, Sequence):
        return drop_zero_area_boxes(records, drop_emptied=filter_empty)
    return records


def test_records(where: str, name: str, proposal_files: Sequence[str] | None) -> Any:
    """Load a test set. Every process must call it.

    Raises:
        ValueError: it cannot be loaded.
    """
    records = _load(where, [name], None) if proposal_files is None else None
    if records is None:
        return _load_dicts(where, [name], proposal_files, filter_empty=False)
    return records


def records_needed(needs: Needs) -> Any:
    """Load the training sets as a student needs them: :func:`train_records`."""
    return train_records(
        needs.train,
        filter_empty=needs.filter_empty,
        min_keypoints=needs.least_keypoints if needs.keypoints else 0,
        proposal_files=needs.train_proposals,
        needs=needs,
    )


def count_images(needs: Needs) -> int:
    """The number of images that are trained on.

    Raises:
        ValueError: a set cannot be loaded.
    """
    return len(records_needed(needs))


def _load_dicts(
    where: str, names: list[str], proposal_files: Sequence[str] | None, **options: Any
) -> Any:
    """Load sets as Detectron2 does; precomputed proposals, a file for each, by our reader."""
    with loading(where):
        if proposal_files is None:
            return get_detection_dataset_dicts(names, **options)
        return [
            record
            for name, file in zip(names, proposal_files, strict=True)
            for record in add_proposals(get_detection_dataset_dicts(name, **options), file)
        ]


def _load(
    where: str, names: list[str], needs: Needs | None, *, check_consistency: bool = True
) -> Records | None:
    """Load files in COCO's format; None: for Detectron2's readers, or a fault in it."""
    if not names or not all(map(is_coco_instances, names)):
        return None

    def read() -> Records | None:
        ensure_digits(names)
        found = [load_json_set(where, name, needs, annotated=False).records for name in names]
        whole = [records for records in found if records is not None]
        return concatenate(whole) if len(whole) == len(found) else None

    with loading(where):
        records = shared(read)
        for name, (classes, ids) in (records.sets if records is not None else {}).items():
            numbers = {number: i for i, number in enumerate(ids)}
            meta = MetadataCatalog.get(name)
            meta.set(thing_classes=classes, thing_dataset_id_to_contiguous_id=numbers)
        if records is not None and check_consistency:
            check_metadata_consistency("thing_classes", names)
    return records


def _filtered(where: str, records: Records, filter_empty: bool, min_keypoints: int) -> Records:
    kept = records.rows["visible"] >= min_keypoints
    if filter_empty:
        kept &= records.rows["trainable"] > 0
    if not kept.any():
        raise ValueError(f"{where}: no image has an object that can be trained on.")
    if not kept.all():
        logger.info("%d images are left out: too few objects in them.", (~kept).sum())
        records = records.chosen(kept)
    if comm.is_main_process():
        (names, _), *_ = records.sets.values()
        one = [{"category_id": number} for number in range(len(names))]
        places = records.rows[["first", "last"]].tolist()
        objects = [one[i] for first, last in places for i in records.classes[first:last].tolist()]
        print_instances_class_histogram([{"annotations": objects}], names)
    return records
