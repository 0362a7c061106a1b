"""Looks for mistakes in the content of a json file in COCO's format, quickly: with NumPy."""

import contextlib
import math
from collections import Counter, deque
from collections.abc import Sequence
from itertools import chain, repeat
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..coco import LEAST_SIDE
from ..needs import Needs
from .annotations import (
    Annotation,
    are_numbers,
    inspect_keypoints,
    inspect_scoring,
    name,
)
from .findings import Findings
from .masks import inspect_masks

# Examples named in a message.
EXAMPLES = 3


def inspect_coco(
    content: dict[str, Any],
    needs: Needs,
    *,
    unique_annotations: bool = True,
    coco: bool = True,
    read: bool = True,
) -> Findings:
    """Inspect parsed json.

    Args:
        content: with the lists "images", "categories" and, except for test sets, "annotations".
        needs: of the student.
        unique_annotations: False: annotations may share an id, as in COCO's own minival files.
        coco: False: a relative of COCO's format, with other keys for what only Detectron2's
            reader and COCO's evaluation ask for.
        read: False: the file is only ground truth, and images are read from elsewhere.

    Returns:
        counts and problems; only what could be read is counted where entries are malformed.
    """
    images, annotations = content["images"], content.get("annotations", [])
    categories = content["categories"]
    found = Findings(len(images), len(annotations), len(categories))
    found.scored = "annotations" in content
    tables = (
        ("images", images, ("id", "width", "height", *(("file_name",) if coco and read else ()))),
        ("annotations", annotations, ("id", "image_id", "category_id", "bbox")),
        ("categories", categories, ("id", "name")),
    )
    for title, rows, keys in tables:
        for key in keys:
            _require(found, title, rows, key)
    if not found.problems:
        _texts(found, "images", images, "file_name")
        _texts(found, "categories", categories, "name")
        _kinds_of_ids(found, content)
    if found.problems:
        return found
    for title, rows, _ in tables:
        if title != "annotations" or unique_annotations:
            _unique(found, title, rows)
    _unique(found, "categories", categories, key="name")
    size_of = _sizes(found, images, needs)
    found.empty_images = len(images)
    if not annotations or found.problems:
        return found
    owner = _owners(images, annotations, "image_id")
    kind = _owners(categories, annotations, "category_id")
    _report(found, annotations, kind < 0, "category_id", "of no category in the file")
    orphans = owner < 0
    if orphans.all():
        _report(found, annotations, orphans, "image_id", "of no image in the file")
        return found
    if orphans.any():  # images were taken out of the file
        found.notes.append(
            f"{int(orphans.sum())} annotations left out, of no image in the file "
            f"({_examples(annotations, orphans, 'image_id')})"
        )
        annotations = [a for a, orphan in zip(annotations, orphans, strict=True) if not orphan]
        owner = owner[~orphans]
    found.usable = _flags(found, annotations)
    boxes = _boxes(found, annotations, size_of[owner])
    found.empty_images = len(images) - len(np.unique(owner))
    if coco and not found.problems:
        owners = owner.tolist()
        shapes = [(image["height"], image["width"]) for image in images]
        inspect_masks(found, annotations, [shapes[i] for i in owners], needs)
        inspect_keypoints(found, annotations, owners, needs)
        unscorable = inspect_scoring(annotations)
        found.unscorable += unscorable
        if not unscorable:
            _areas(found, annotations, boxes)
    _scored_ids(found, annotations, coco=coco)
    return found


def _require(found: Findings, title: str, rows: Sequence[Any], key: str) -> None:
    try:
        deque(map(itemgetter(key), rows), maxlen=0)
    except (KeyError, TypeError, IndexError):
        missing = [i for i, row in enumerate(rows) if not isinstance(row, dict) or key not in row]
        found.problems.append(
            f'{len(missing)} of "{title}" have no "{key}" (the first is number {missing[0]})'
        )


def _texts(found: Findings, title: str, rows: Sequence[dict[str, Any]], key: str) -> None:
    wrong = [row for row in rows if not isinstance(row.get(key, ""), str)]
    if wrong:
        found.problems.append(
            f'{len(wrong)} of "{title}" have a "{key}" that is not a text '
            f"(for example id {wrong[0]['id']}: {wrong[0][key]!r})"
        )


def _kinds_of_ids(found: Findings, content: dict[str, Any]) -> None:
    """Ids that refer to each other must be all numbers or all text: Detectron2 sorts them."""
    annotations = content.get("annotations", [])
    for title, key in (("images", "image_id"), ("categories", "category_id")):
        columns = {
            f'"id" of "{title}"': [row["id"] for row in content[title]],
            f'"{key}" of "annotations"': [row[key] for row in annotations],
        }
        if all(set(map(type, column)) <= {int} for column in columns.values()):
            continue
        kinds = {_kind(value): (what, value) for what, col in columns.items() for value in col}
        if len(kinds) > 1 or "other" in kinds:
            shown = " and ".join(f"{what}: {value!r}" for what, value in kinds.values())
            found.problems.append(
                f'"{title}" are known by ids of several kinds ({shown}); expected all whole '
                "numbers, or all text"
            )
    odd = [a["id"] for a in annotations if isinstance(a["id"], list | dict)]
    if odd:
        found.problems.append(
            f'{len(odd)} "annotations" have an "id" that is not a number: {odd[0]}'
        )


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    return "number" if type(value) in (int, float) and math.isfinite(value) else "other"


def _unique(
    found: Findings, title: str, rows: Sequence[dict[str, Any]], *, key: str = "id"
) -> None:
    counts = Counter(row[key] for row in rows)
    if len(counts) == len(rows):
        return
    twice = [value for value, count in counts.items() if count > 1]
    examples = ", ".join(str(value) for value in twice[:EXAMPLES])
    message = f'{len(twice)} {key}s of "{title}" appear more than once (for example {examples})'
    # Two classes of one name train, but the AP of one hides that of the other.
    (found.problems if key == "id" else found.notes).append(message)


def _owners(
    known: Sequence[dict[str, Any]], rows: Sequence[Annotation], key: str
) -> NDArray[np.int64]:
    """Return the position in ``known`` of what each row refers to by its id, or -1."""
    place = {row["id"]: i for i, row in enumerate(known)}
    found = map(place.get, map(itemgetter(key), rows), repeat(-1))
    return np.fromiter(found, np.int64, len(rows))


def _sizes(found: Findings, images: Sequence[dict[str, Any]], needs: Needs) -> NDArray[np.float64]:
    sizes = _numbers([(image["width"], image["height"]) for image in images], 2)
    # A size that is not whole is wrong.
    whole = np.isfinite(sizes) & (np.floor(sizes) == sizes) & (sizes > 0)
    wrong = ~whole.all(axis=1)
    if wrong.any():
        first = images[int(np.argmax(wrong))]
        found.problems.append(
            f'{int(wrong.sum())} of "images" have a width or height that is not a positive whole '
            f"number (for example id {first['id']}: {first['width']!r} x {first['height']!r})"
        )
    elif needs.masks:
        floats = [i for i in images if {type(i["width"]), type(i["height"])} != {int}]
        if floats:
            found.unscorable.append(
                f'{len(floats)} of "images" have a width or height with a decimal point (for '
                f"example id {floats[0]['id']}: {floats[0]['width']!r}), which pycocotools does "
                "not take for masks: write whole numbers."
            )
    return sizes


def _flags(found: Findings, annotations: Sequence[Annotation]) -> int:
    """Look at "ignore" and "iscrowd"; return how many are not crowds."""
    ignored = np.array([a.get("ignore", 0) != 0 for a in annotations])
    advice = 'that is not supported: use "iscrowd" or leave it out'
    _report(found, annotations, ignored, "ignore", advice)
    flags = [a.get("iscrowd", 0) for a in annotations]
    if not set(map(type, flags)) <= {int, bool}:
        flags = [flag if flag in (0, 1) else -1 for flag in flags]
    crowd = np.array(flags)
    _report(found, annotations, (crowd != 0) & (crowd != 1), "iscrowd", "that is neither 0 nor 1")
    return int((crowd == 0).sum())


def _boxes(
    found: Findings, annotations: Sequence[Annotation], sizes: NDArray[np.float64]
) -> NDArray[np.float64]:
    boxes = _numbers([annotation["bbox"] for annotation in annotations], 4)
    finite = np.asarray(np.isfinite(boxes).all(axis=1))
    _report(found, annotations, ~finite, "bbox", "that is not four finite numbers")
    negative = finite & np.asarray((boxes[:, 2:] < 0).any(axis=1))
    _report(found, annotations, negative, "bbox", "of negative width or height")
    usable = finite & ~negative
    inside = np.where(usable[:, None], boxes, 0.0)
    inside[:, 2:] += inside[:, :2]
    inside = np.clip(inside, 0, np.tile(sizes, 2))
    extent = inside[:, 2:] - inside[:, :2]
    zero = usable & np.asarray((extent <= LEAST_SIDE).any(axis=1))
    found.zero_area = int(zero.sum())
    found.zero_area_examples = _examples(annotations, zero, "bbox")
    # COCO's own boxes exceed the image by rounding: that is not worth a word.
    beyond = np.asarray((boxes[:, 2:] - extent > 0.5).any(axis=1))
    found.clipped = int((usable & ~zero & beyond).sum())
    if finite.all() and (boxes <= 1).all() and (sizes > 2).all() and not zero.all():
        found.untrainable.append(
            f'All {len(boxes)} "bbox" lie within the first pixel (for example '
            f"{_examples(annotations, usable, 'bbox')}): are they fractions of the image? Expected "
            "[x, y, width, height] in pixels."
        )
    return boxes


def _areas(found: Findings, annotations: Sequence[Annotation], boxes: NDArray[np.float64]) -> None:
    area = np.array([a["area"] for a in annotations], dtype=np.float64)
    box = boxes[:, 2] * boxes[:, 3]
    wrong = (area > 1.5 * box + 10) | ((area < 1e-3 * box) & (box > 10))
    if wrong.any():
        found.notes.append(
            f"{int(wrong.sum())} annotations whose area is not that of an object in their box, "
            f"which APs, APm and APl go by ({_examples(annotations, wrong, 'area')})"
        )


def _scored_ids(found: Findings, annotations: Sequence[Annotation], *, coco: bool) -> None:
    """pycocotools and lvis take a match with id 0 for none, and fail at text."""
    wrong = [a for a in annotations if not (type(a["id"]) is int and a["id"] > 0)]
    if not wrong:
        return
    text = (
        f'{len(wrong)} annotations have an "id" that is not a whole number > 0 ({name(wrong[0])})'
    )
    if coco:
        found.notes.append(f"{text}: they are numbered anew to be scored")
    else:
        found.unscorable.append(f"{text}, which the evaluation cannot match.")


def _numbers(rows: Sequence[Any], length: int) -> NDArray[np.float64]:
    """Return (K, length) float64; a row that is not that many numbers becomes NaN. No text."""
    alike = set(map(type, rows)) <= {list, tuple} and set(map(len, rows)) <= {length}
    if alike and set(map(type, chain.from_iterable(rows))) <= {int, float}:
        with contextlib.suppress(OverflowError):  # an integer that no float can hold
            flat = np.fromiter(chain.from_iterable(rows), np.float64, length * len(rows))
            return flat.reshape(-1, length)
    array = np.full((len(rows), length), np.nan)
    for i, row in enumerate(rows):
        if isinstance(row, list | tuple) and len(row) == length and are_numbers(row):
            array[i] = row
    return array


def _report(
    found: Findings, rows: Sequence[Annotation], wrong: NDArray[Any], key: str, what: str
) -> None:
    if wrong.any():
        found.problems.append(
            f'{int(wrong.sum())} annotations have a "{key}" {what} '
            f"(for example {_examples(rows, wrong, key)})"
        )


def _examples(rows: Sequence[Annotation], wrong: NDArray[Any], key: str) -> str:
    first = [rows[int(i)] for i in np.flatnonzero(wrong)[:EXAMPLES]]
    return ", ".join(f"{name(row)}: {row[key]!r}" for row in first)
