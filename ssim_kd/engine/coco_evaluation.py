"""COCO's evaluation of a data set: what of the config and the annotations it has to be given."""

import contextlib
import io
import json
import logging
import os
import tempfile
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import convert_to_coco_json
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.coco import own_json_file
from ..data.coco_scores import EXACT, is_fast, score

logger = logging.getLogger(__name__)

# Detections of an image and class that COCO's metrics count.
COCO_DETECTIONS = 100


class ScoredCOCOEvaluator(COCOEvaluator):
    """Detectron2's, for annotations with any id; by faster-coco-eval if that is installed.

    pycocotools stores the id of what a detection has matched, and takes 0 for no match; text fails.
    Files that count from 0 are common. The ids name nothing in the results, so that they are
    numbered anew unless all are whole numbers > 0 that a float can hold.
    """

    def __init__(self, dataset_name: str, **options: Any) -> None:
        super().__init__(dataset_name, **options)
        annotations = self._coco_api.dataset.get("annotations", [])
        if any(not (type(a["id"]) is int and 0 < a["id"] < EXACT) for a in annotations):
            for number, annotation in enumerate(annotations, start=1):
                annotation["id"] = number
            self._coco_api.createIndex()

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: Any = None) -> None:
        if not (self._do_evaluation and is_fast(self._coco_api)):
            super()._eval_predictions(predictions, img_ids)
            return
        results = [row for prediction in predictions for row in prediction["instances"]]
        numbers = self._metadata.get("thing_dataset_id_to_contiguous_id") or {}
        ids = {number: category for category, number in numbers.items()}
        for row in results:
            row["category_id"] = ids[row["category_id"]] if ids else row["category_id"]
        if self._output_dir:
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            with PathManager.open(path, "w") as file:
                file.write(json.dumps(results))
        for task in sorted(self._tasks or self._tasks_from_predictions(results)):
            scores = self._score(results, task, img_ids)
            names = self._metadata.get("thing_classes")
            self._results[task] = self._derive_coco_results(scores, task, class_names=names)

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: Any = None
    ) -> dict[str, float]:
        # Without detections the AP is 0. Detectron2 has NaN, which stands for no ground truth.
        coco_eval = coco_eval or self._score([], iou_type, None)
        return super()._derive_coco_results(coco_eval, iou_type, class_names)

    def _score(self, results: list[dict[str, Any]], task: str, images: Any) -> COCOeval:
        # Masks are small, medium or large by their own area, not by that of a box.
        left_out = "bbox" if task == "segm" else ""
        results = [{k: v for k, v in row.items() if k != left_out} for row in results]
        with contextlib.redirect_stdout(io.StringIO()):
            if results:
                found = self._coco_api.loadRes(results)
            else:  # which loadRes does not take
                found = COCO()
                found.dataset = {**self._coco_api.dataset, "annotations": []}
                found.createIndex()
        scores = score(
            self._coco_api,
            found,
            task,
            limits=self._max_dets_per_image,
            sigmas=self._kpt_oks_sigmas,
            images=images,
        )
        scores.summarize()
        return scores


def build_coco_evaluator(cfg: CfgNode, name: str, folder: str) -> COCOEvaluator:
    """Build the evaluator of a set that has a json file, or records that are converted to one.

    ``TEST.DETECTIONS_PER_IMAGE`` above 100 and ``TEST.KEYPOINT_OKS_SIGMAS`` reach it. Records are
    converted each time: Detectron2 would take a file of an earlier run, whose records may differ.

    Args:
        cfg: of the student.
        name: of a registered set.
        folder: for its results.
    """
    options: dict[str, Any] = {
        "output_dir": folder,
        "kpt_oks_sigmas": list(cfg.TEST.KEYPOINT_OKS_SIGMAS),
    }
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    if limit > COCO_DETECTIONS:
        options["max_dets_per_image"] = limit
        logger.info(
            "%s: AP with up to %d detections of an image and class, which is "
            "TEST.DETECTIONS_PER_IMAGE; COCO's own is with %d.",
            name,
            limit,
            COCO_DETECTIONS,
        )
    if own_json_file(name):
        return ScoredCOCOEvaluator(name, **options)
    meta = MetadataCatalog.get(name)
    # json_file of Detectron2's own conversion, in an earlier run's folder.
    meta.__dict__.pop("json_file", None)
    with tempfile.TemporaryDirectory() as temporary:
        path = os.path.join(temporary, f"{name.replace(os.sep, '_')}.json")
        convert_to_coco_json(name, path, allow_cached=False)
        meta.json_file = path
        try:
            return ScoredCOCOEvaluator(name, **options)
        finally:
            del meta.json_file
