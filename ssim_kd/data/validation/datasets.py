"""Checks the data sets of a config before anything is built: ``check_datasets(cfg, train=...)``."""

import difflib
import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ...ops.options import check_choice
from ...sharing import without_queries
from ..coco import loading, own_json_file, reads_json_file, source_of_set
from ..digits import ensure_digits
from ..json_file import read_instances
from ..needs import Needs
from .classes import (
    check_classes,
    check_ground_truth,
    check_keypoint_names,
    check_metadata,
    check_same_classes,
    check_stuff_classes,
    lvis_classes,
)
from .coco_file import inspect_coco
from .findings import DatasetSummary, Findings
from .json_sets import COCO_KINDS, load_json_set
from .records import inspect_records
from .scoring import check_test_keys

_LVIS_READER = "detectron2.data.datasets.lvis"


# What was found; the classes; what to correct: a file, or the records.
_Inspected = tuple[Findings | None, Sequence[str], str]


def _from_config(cfg: CfgNode) -> dict[str, Any]:
    return {"needs": Needs.from_config(cfg)}


@configurable(from_config=_from_config)
def check_datasets(
    needs: Needs, *, train: bool, own_loader: bool = False, own_evaluator: bool = False
) -> list[DatasetSummary]:
    """Check that every data set of a training can be used. It reads each json file once.

    Sets that code registers are loaded once, to compare their classes with the student's. Image
    files are not touched: :func:`build_train_loader` checks those that Detectron2's mapper reads.
    The embedded digits are made if they are not there. Run it on one rank (it may read 500 MB).

    Args:
        needs: or a config, of which they are read. Its sets must be registered.
        train: True checks the training and the test sets, False only the latter.
        own_loader: whether code of the user's builds the training loader: the training sets may
            then be none or name sets that are not registered, which are not checked.
        own_evaluator: whether code of the user's builds the evaluators: nothing is asked for that
            only those of Detectron2 read.

    Returns:
        a summary of each set, in order; its ``str`` is one line.

    Raises:
        FileNotFoundError: a json file or a folder is not there.
        ValueError: anything else. Both name the key, the set, the file and what to do.
    """
    check_choice(needs.key("DATASETS.ZERO_AREA_BOXES"), needs.zero_area, ("error", "drop"))
    if train and needs.masks:
        check_choice(needs.key("INPUT.MASK_FORMAT"), needs.mask_format, ("polygon", "bitmask"))
    if train and not own_loader and not needs.train:
        raise ValueError(f"{needs.key('DATASETS.TRAIN')} is empty: expected a data set name.")
    if not own_evaluator:
        check_test_keys(needs)
    summaries: list[DatasetSummary] = []
    known: dict[tuple[str, bool], _Inspected] = {}
    by_name: dict[str, Sequence[str]] = {}
    for training in (True, False) if train else (False,):
        key = needs.key("DATASETS.TRAIN" if training else "DATASETS.TEST")
        names = needs.train if training else needs.test
        if isinstance(names, str):
            raise ValueError(f"{key} is {names!r}: expected a list: ({names!r},).")
        for name in names:
            where = f"{key}: data set {name!r}"
            if training and own_loader and name not in DatasetCatalog:
                continue
            _check_registered(where, name)
            # What is read from json is the same for both keys.
            same = (name, training and not reads_json_file(name))
            if same not in known:
                scored = not training and not own_evaluator
                known[same] = _inspect(where, name, needs, training=training, scored=scored)
            found, classes, source = known[same]
            if found is not None and training:
                _check_training(needs, f"{where}: {source}", found)
            elif found is not None and not own_evaluator:
                _check_scoring(f"{where}: {source}", found)
            if classes:
                check_classes(needs, where, classes)
                by_name[name] = classes
            if training:
                check_keypoint_names(needs, where, MetadataCatalog.get(name))
            check_stuff_classes(needs, where, MetadataCatalog.get(name).get("stuff_classes", ()))
            summaries.append(DatasetSummary(key, name, found, training, classes))
    check_same_classes(needs, by_name)
    return summaries


def check_records_for_mapper(needs: Needs, where: str, records: Sequence[Any]) -> None:
    """Check the records that Detectron2's DatasetMapper will be trained with.

    Raises:
        ValueError: it would fail at one; the message names the record.
    """
    found = inspect_records(records, needs.num_classes, mapped=needs)
    if not found.scored and needs.num_classes is not None:
        found.problems.append('none has "annotations", which a detector is trained with')
    _refuse(f"{where}: its records", found.problems)


def _check_registered(where: str, name: str) -> None:
    if name not in DatasetCatalog:
        registered = sorted(DatasetCatalog.keys())
        close = difflib.get_close_matches(name, registered, n=5) or registered
        raise ValueError(
            f"{where} is not registered. Close to it: {', '.join(close)}. Data in COCO's format is "
            "registered by DATASETS.REGISTER_COCO: [[name, json file, image folder], ...]."
        )


def _inspect(where: str, name: str, needs: Needs, *, training: bool, scored: bool) -> _Inspected:
    """Inspect one set: its json file if there is one, its records where code registers it."""
    ensure_digits([name])
    meta = MetadataCatalog.get(name)
    kind = meta.get("evaluator_type", "coco")
    json_file, read = own_json_file(name), reads_json_file(name)
    source = without_queries(json_file)
    module = getattr(DatasetCatalog[name], "__module__", "") or ""
    content = None
    found: Findings | None = None
    if json_file and (read or scored) and not PathManager.isfile(json_file):
        raise FileNotFoundError(f"{where}: {source} does not exist. {_advice(name)}")
    if read:
        json_set = load_json_set(where, name, needs, annotated=training)
        _refuse(f"{where}: {source}", json_set.findings.problems)
        ids, names = zip(*json_set.categories, strict=True)
        if module == _LVIS_READER:
            names = lvis_classes(where, name, source, ids)
        elif kind in COCO_KINDS:
            check_metadata(where, name, source, list(names))
        return json_set.findings, names, source
    if json_file and scored:
        content = read_instances(where, json_file, annotated=training)
        unique = "minival" not in json_file
        coco = kind in COCO_KINDS
        found = inspect_coco(content, needs, unique_annotations=unique, coco=coco, read=False)
        _refuse(f"{where}: {source}", found.problems)
    if module.startswith("detectron2.data.datasets."):
        folder = meta.get("image_root") or meta.get("dirname") or meta.get("image_dir")
        if folder and not PathManager.isdir(folder):
            raise FileNotFoundError(f"{where}: the folder {folder} does not exist. {_advice(name)}")
        # That of Cityscapes takes minutes; the classes are known.
        if kind.startswith("cityscapes"):
            return found, meta.get("thing_classes", ()), source
    with loading(where):
        records = DatasetCatalog.get(name)
    classes = () if kind == "sem_seg" else meta.get("thing_classes", ())
    if not isinstance(records, Sequence):
        return found, classes, source
    coco = kind in COCO_KINDS and scored
    inspected = inspect_records(
        records, len(classes) or needs.num_classes, scored=coco, converted=coco and not json_file
    )
    _refuse(f"{where}: its records", inspected.problems)
    if coco and not json_file and inspected.annotations and not classes:
        raise ValueError(
            f"{where} has no thing_classes, which COCO's evaluation needs: "
            f"MetadataCatalog.get({name!r}).set(thing_classes=[...])."
        )
    if content is not None and found is not None and kind in COCO_KINDS:
        check_ground_truth(where, name, source, content, records)
        inspected = found
    return inspected, classes, source or "its records"


def _check_scoring(where: str, found: Findings) -> None:
    if not found.scored:
        return
    if not found.usable and not found.unscorable:
        raise ValueError(
            f'{where}: no "annotations" to be scored: the AP would be NaN. Expected at least one '
            "that is not a crowd."
        )
    _refuse(where, found.unscorable)


def _check_training(needs: Needs, where: str, found: Findings) -> None:
    _refuse(where, found.untrainable)
    if found.zero_area and needs.zero_area == "error":
        raise ValueError(
            f"{where}: {found.zero_area} boxes have zero area or lie outside their images (for "
            f"example {found.zero_area_examples}). Expected [x, y, width, height] in pixels, or "
            f'{needs.key("DATASETS.ZERO_AREA_BOXES")} "drop" to leave them out.'
        )


def _refuse(where: str, problems: list[str]) -> None:
    """Clauses are joined; sentences say what to do."""
    if problems and problems[0].endswith("."):
        raise ValueError(f"{where}: {' '.join(problems)}")
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}. Correct it.")


def _advice(name: str) -> str:
    if source := source_of_set(name):
        return f"Correct the path in {source}."
    root = os.environ.get("DETECTRON2_DATASETS")
    state = f"it is {root!r}" if root else "it is not set, so ./datasets is used"
    return (
        "Detectron2's built-in sets lie under the folder named by the environment variable "
        f"DETECTRON2_DATASETS ({state}): <folder>/coco/annotations/*.json and "
        "<folder>/coco/train2017/*.jpg for COCO. Set it, or link the data there."
    )
