"""Ground truth and detections of a run, and pictures with both."""

import base64
import contextlib
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import detection_utils as utils
from PIL import Image
from pycocotools.coco import COCO

from ..data.coco import annotation_files
from ..data.digits.dataset import DIGITS_NAMES, splits_from_config
from ..data.json_file import read_instances
from ..data.needs import Needs
from ..data.validation.coco_file import inspect_coco
from .errors import CORRECT, IGNORED, ErrorAnalysis, analyse
from .runs import PREDICTIONS, NotAvailableError, Run

#: Detections below it are not drawn.
MIN_SCORE = 0.5
#: Longer side of an embedded picture in pixels, at most.
_SIDE = 480


@dataclass(frozen=True)
class TestSet:
    """A set in COCO format that runs were tested on.

    Attributes:
        name: of the set.
        json_file: its annotations.
        image_root: folder of its images.
        drawn: of the digits, a name for all that decides what they are; else "".
    """

    name: str
    json_file: str
    image_root: str
    drawn: str = ""

    def is_same(self, other: "TestSet") -> bool:
        """Whether another one has the same annotations."""
        if self.drawn:
            return self.drawn == other.drawn
        return Path(self.json_file).resolve() == Path(other.json_file).resolve()


@dataclass
class Detections:
    """Detections of a run on a set, and their errors.

    Attributes:
        found: the detections.
        errors: their analysis.
        limit: of detections that count, of an image and class.
    """

    found: COCO
    errors: ErrorAnalysis
    limit: int


class _Row(msgspec.Struct):
    """A detection in a file of Detectron2's COCOEvaluator."""

    image_id: int | float | str
    category_id: int | float | str
    score: float
    bbox: tuple[float, float, float, float] | None = None


def find_test_set(run: Run, name: str) -> TestSet:
    """The files of a set that a run was tested on.

    Raises:
        NotAvailableError: no such files are known.
    """
    for entry in run.get("DATASETS.REGISTER_COCO") or ():
        if entry[0] == name:
            _, json_file, image_root = (str(Path(text).expanduser()) for text in entry)
            return TestSet(name, json_file, image_root)
    digits = {k: v for k, v in run.config.items() if k.startswith("DATASETS.DIGITS.")}
    if name in DIGITS_NAMES and digits:
        node = CfgNode({key.rsplit(".", 1)[1]: value for key, value in digits.items()})
        try:
            splits = splits_from_config(CfgNode({"DATASETS": CfgNode({"DIGITS": node})}))
        except (AttributeError, ValueError) as error:
            raise NotAvailableError(f"DATASETS.DIGITS of its config: {error}") from error
        split = splits[DIGITS_NAMES.index(name)]
        return TestSet(name, str(split.json_file), str(split.folder), split.folder.name)
    files = run.test_files.get(name) or annotation_files(name)
    if files:
        return TestSet(name, *files)
    raise NotAvailableError(
        f"the annotations of {name or 'the test set'} are unknown: no set in COCO format of "
        "DATASETS.REGISTER_COCO, and none that is registered here"
    )


def read_truth(test_set: TestSet) -> COCO:
    """The boxes of a set.

    Raises:
        NotAvailableError: the file cannot be read.
    """
    try:
        content = read_instances("the test set", test_set.json_file, annotated=True)
        if problems := inspect_coco(content, Needs(), unique_annotations=False).problems:
            raise ValueError("; ".join(problems))
    except (OSError, ValueError) as error:
        raise NotAvailableError(
            f"the annotations {test_set.json_file} are not readable: {_short(error)}"
        ) from error
    # pycocotools takes an id of 0 for no match.
    numbered = [
        {"iscrowd": 0, **a, "id": number}
        for number, a in enumerate(content["annotations"], start=1)
    ]
    for annotation in numbered:
        if not isinstance(annotation.get("area"), int | float):
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    return _index({**content, "annotations": numbered})


def read_detections(path: Path, truth: COCO, *, limit: int) -> Detections:
    """Read and analyse a file that Detectron2's COCOEvaluator wrote.

    Raises:
        NotAvailableError: the file does not exist, or is of another set.
    """
    try:
        rows = msgspec.json.decode(path.read_bytes(), type=list[_Row])
    except FileNotFoundError:
        raise NotAvailableError(f"no {path.name} in {path.parent}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise NotAvailableError(f"{path} is not readable: {_short(error)}") from error
    boxes = [
        {
            **{"image_id": row.image_id, "category_id": row.category_id, "score": row.score},
            **{"id": number, "iscrowd": 0},
            **{"bbox": list(row.bbox), "area": row.bbox[2] * row.bbox[3]},
        }
        for number, row in enumerate(rows, start=1)
        if row.bbox is not None
    ]
    alien = {box["image_id"] for box in boxes} - truth.imgs.keys()
    alien |= {box["category_id"] for box in boxes} - truth.cats.keys()
    if alien:
        raise NotAvailableError(
            f"{path} has images or classes that the test set lacks: it is of another set"
        )
    found = _index(
        {key: truth.dataset[key] for key in ("images", "categories")} | {"annotations": boxes}
    )
    return Detections(found, analyse(truth, found, limit=limit), limit)


def detections_of(run: Run, truth: COCO, folder: Path | None = None) -> Detections:
    """The detections that a run's last evaluation left, or those in another folder.

    Raises:
        NotAvailableError: as :func:`read_detections`.
    """
    limit = int(run.get("TEST.DETECTIONS_PER_IMAGE", default=100))
    return read_detections((folder or run.folder) / PREDICTIONS, truth, limit=max(100, limit))


def _index(content: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def choose_images(truth: COCO, count: int) -> list[int]:
    """Ids of images with boxes, evenly spaced through the set."""
    shown = [
        image["id"]
        for image in truth.dataset["images"]
        if any(not a["iscrowd"] for a in truth.imgToAnns.get(image["id"], []))
    ]
    places = np.linspace(0, len(shown) - 1, min(count, len(shown))).round().astype(int)
    return [shown[place] for place in places]


def draw_image(test_set: TestSet, truth: COCO, number: int) -> dict[str, Any]:
    """An image for the page: a data URI, its size in pixels and the boxes of the ground truth.

    Raises:
        NotAvailableError: the file cannot be read.
    """
    name = truth.imgs[number]["file_name"]
    path = Path(test_set.image_root) / name
    try:
        picture = Image.fromarray(utils.read_image(str(path), format="RGB"))
    except Exception as error:  # of any decoder
        raise NotAvailableError(f"{path} is not readable: {_short(error)}") from error
    width, height = picture.size
    picture.thumbnail((_SIDE, _SIDE))
    data = io.BytesIO()
    picture.save(data, format="JPEG", quality=82)
    uri = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
    boxes = [
        _box(truth, a, "crowd" if a["iscrowd"] else "truth")
        for a in truth.imgToAnns.get(number, [])
    ]
    return {"name": name, "uri": uri, "width": width, "height": height, "boxes": boxes}


def draw_boxes(truth: COCO, detections: Detections, number: int) -> dict[str, Any]:
    """The boxes to draw over an image: detections by kind of error, and what none of them finds.

    Returns:
        "boxes", and "summary", a line.
    """
    shown = [
        d
        for d in detections.found.imgToAnns.get(number, [])
        if d["score"] >= MIN_SCORE and d["id"] in detections.errors.kinds
    ]
    kinds, matches = detections.errors.kinds, detections.errors.matches
    hit = {matches[d["id"]] for d in shown if d["id"] in matches}
    boxes = [
        _box(truth, a, "missed")
        for a in truth.imgToAnns.get(number, [])
        if not a["iscrowd"] and a["id"] not in hit
    ]
    count = Counter({"not found": len(boxes)})
    for detection in sorted(shown, key=lambda d: float(d["score"])):
        kind = kinds[detection["id"]]
        count[kind] += 1
        boxes.append(_box(truth, detection, kind))
    named = [CORRECT, *sorted(count.keys() - {CORRECT, IGNORED, "not found"}), "not found"]
    parts = [f"{count[kind]} {kind}" for kind in named if count[kind] or kind == CORRECT]
    if not shown:
        parts.insert(0, f"no detection at {MIN_SCORE} or more")
    return {"boxes": boxes, "summary": ", ".join(parts)}


def _box(truth: COCO, annotation: dict[str, Any], kind: str) -> dict[str, Any]:
    x, y, width, height = (round(float(v), 2) for v in annotation["bbox"])
    name = str(truth.cats[annotation["category_id"]]["name"])
    score = annotation.get("score")
    label = name if score is None else f"{name} {score:.0%}"
    shape = "wrong" if kind not in (CORRECT, IGNORED, "truth", "crowd", "missed") else kind
    meaning = {"truth": "", CORRECT: "", "missed": " (not found)"}.get(kind, f" ({kind})")
    return {
        **{"x": x, "y": y, "width": width, "height": height},
        **{"shape": shape, "label": label, "title": label + meaning},
    }
