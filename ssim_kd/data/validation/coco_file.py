"""Looks for mistakes in the content of a json file in COCO's format, quickly: with NumPy."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..coco import LEAST_SIDE, box_extent
from .ground_truth import inspect_masks, inspect_scoring

# Examples named in a message.
EXAMPLES = 3


@dataclass
class Findings:
    """What a json file holds and what is wrong with it.

    Attributes:
        images, annotations, categories: how many there are.
        empty_images: images without any annotation.
        clipped: boxes partly outside their image, which are clipped to it.
        zero_area: boxes of zero area, or wholly outside their image.
        scored: whether the file has annotations at all (COCO's test-dev has not).
        zero_area_examples: some of these, in words.
        problems: what makes the file unusable, one clause each.
        untrainable, unscorable: what makes it unusable for training or for being scored, one
            sentence each.
        masks_untrainable, masks_unscorable: the same, of masks.
    """

    images: int = 0
    annotations: int = 0
    categories: int = 0
    empty_images: int = 0
    clipped: int = 0
    zero_area: int = 0
    scored: bool = True
    zero_area_examples: str = ""
    problems: list[str] = field(default_factory=list)
    untrainable: list[str] = field(default_factory=list)
    unscorable: list[str] = field(default_factory=list)
    masks_untrainable: list[str] = field(default_factory=list)
    masks_unscorable: list[str] = field(default_factory=list)


def inspect_coco(
    content: dict[str, Any], *, unique_annotations: bool = True, coco: bool = True
) -> Findings:
    """Inspect parsed json.

    Args:
        content: with the lists "images", "categories" and, but for test sets, "annotations".
        unique_annotations: False: annotations may share an id, as in COCO's own minival files.
        coco: False: a relative of COCO's format, with other keys for what only Detectron2's
            reader and COCO's evaluation ask for.

    Returns:
        counts and problems; only what could be read is counted where entries are malformed.
    """
    images, annotations = content["images"], content.get("annotations", [])
    categories = content["categories"]
    found = Findings(len(images), len(annotations), len(categories))
    found.scored = "annotations" in content
    tables = (
        ("images", images, ("id", "width", "height", *(("file_name",) if coco else ()))),
        ("annotations", annotations, ("id", "image_id", "category_id", "bbox")),
        ("categories", categories, ("id", "name")),
    )
    for title, rows, keys in tables:
        for key in keys:
            _require(found, title, rows, key)
    if not found.problems:
        _texts(found, "images", images, "file_name")
        _texts(found, "categories", categories, "name")
    if found.problems:
        return found
    for title, rows, _ in tables:
        if title == "annotations" and not unique_annotations:
            continue
        _unique(found, title, _ids(rows, "id"))
    size_of = _sizes(found, images)
    found.empty_images = len(images)
    if not annotations:
        return found
    owner = _lookup(_ids(images, "id"), _ids(annotations, "image_id"))
    kind = _lookup(_ids(categories, "id"), _ids(annotations, "category_id"))
    _report(found, annotations, owner < 0, "image_id", "of no image in the file")
    _report(found, annotations, kind < 0, "category_id", "of no category in the file")
    ignored = np.array([bool(a.get("ignore", 0)) for a in annotations])
    _report(
        found,
        annotations,
        ignored,
        "ignore",
        'that is not supported: use "iscrowd" or leave it out',
    )
    crowd = np.array([a.get("iscrowd", 0) not in (0, 1) for a in annotations])
    _report(found, annotations, crowd, "iscrowd", "that is neither 0 nor 1")
    _boxes(found, annotations, owner, size_of)
    if coco:
        found.unscorable = inspect_scoring(annotations)
        found.untrainable, found.masks_untrainable, found.masks_unscorable = inspect_masks(
            annotations
        )
    found.empty_images = len(images) - len(np.unique(owner[owner >= 0]))
    return found


def _require(found: Findings, title: str, rows: Sequence[Any], key: str) -> None:
    missing = [i for i, row in enumerate(rows) if not isinstance(row, dict) or key not in row]
    if missing:
        found.problems.append(
            f'{len(missing)} of "{title}" have no "{key}" (the first is number {missing[0]})'
        )


def _texts(found: Findings, title: str, rows: Sequence[dict[str, Any]], key: str) -> None:
    wrong = [row for row in rows if not isinstance(row.get(key, ""), str)]
    if wrong:
        found.problems.append(
            f'{len(wrong)} of "{title}" have a "{key}" that is no text '
            f"(for example id {wrong[0]['id']}: {wrong[0][key]!r})"
        )


def _ids(rows: Sequence[dict[str, Any]], key: str) -> NDArray[Any]:
    """Ids as integers where all are, else as text: they may be either."""
    values = [row[key] for row in rows]
    array = np.array(values) if values else np.zeros(0, dtype=np.int64)
    if array.ndim == 1 and array.dtype.kind in "iu":
        return array.astype(np.int64)
    return np.array([repr(value) for value in values])


def _unique(found: Findings, title: str, ids: NDArray[Any]) -> None:
    values, counts = np.unique(ids, return_counts=True)
    twice = values[counts > 1]
    if len(twice):
        examples = ", ".join(str(value) for value in twice[:EXAMPLES])
        found.problems.append(
            f'{len(twice)} ids of "{title}" appear more than once (for example {examples})'
        )


def _lookup(known: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.int64]:
    """Return the position in ``known`` of each wanted id, or -1."""
    if known.dtype.kind != wanted.dtype.kind:
        known, wanted = known.astype(str), wanted.astype(str)
    if not len(known):
        return np.full(len(wanted), -1, dtype=np.int64)
    order = np.argsort(known, kind="stable")
    position = np.minimum(np.searchsorted(known[order], wanted), len(known) - 1)
    position = order[position]
    return np.where(known[position] == wanted, position, -1).astype(np.int64)


def _sizes(found: Findings, images: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    sizes = _numbers([(image["width"], image["height"]) for image in images], 2)
    wrong = ~(np.isfinite(sizes).all(axis=1) & (sizes > 0).all(axis=1))
    if wrong.any():
        first = images[int(np.argmax(wrong))]
        found.problems.append(
            f'{int(wrong.sum())} of "images" have a width or height that is not a positive number '
            f"(for example id {first['id']}: {first['width']} x {first['height']})"
        )
    return sizes


def _boxes(
    found: Findings,
    annotations: Sequence[dict[str, Any]],
    owner: NDArray[np.int64],
    size_of: NDArray[np.float64],
) -> None:
    boxes = _numbers([annotation["bbox"] for annotation in annotations], 4)
    finite = np.asarray(np.isfinite(boxes).all(axis=1))
    _report(found, annotations, ~finite, "bbox", "that is not four finite numbers")
    negative = finite & np.asarray((boxes[:, 2:] < 0).any(axis=1))
    _report(found, annotations, negative, "bbox", "of negative width or height")
    sizes = size_of[owner]
    sized = np.asarray(np.isfinite(sizes).all(axis=1))
    usable = finite & ~negative & (owner >= 0) & sized
    extent = box_extent(np.where(usable[:, None], boxes, 0.0), sizes)
    zero = usable & np.asarray((extent <= LEAST_SIDE).any(axis=1))
    found.zero_area = int(zero.sum())
    found.zero_area_examples = _examples(annotations, zero, "bbox")
    # COCO's own boxes exceed the image by rounding: that is not worth a word.
    beyond = np.asarray((boxes[:, 2:] - extent > 0.5).any(axis=1))
    found.clipped = int((usable & ~zero & beyond).sum())


def _numbers(rows: Sequence[Any], length: int) -> NDArray[np.float64]:
    """Return (K, length) float64; a row that is not that many numbers becomes NaN."""
    try:
        array = np.array(rows, dtype=np.float64)
        if array.shape == (len(rows), length):
            return array
    except (TypeError, ValueError):
        pass
    array = np.full((len(rows), length), np.nan)
    for i, row in enumerate(rows):
        try:
            values = np.array(row, dtype=np.float64)
        except (TypeError, ValueError):
            continue
        if values.shape == (length,):
            array[i] = values
    return array


def _report(
    found: Findings, rows: Sequence[dict[str, Any]], wrong: NDArray[Any], key: str, what: str
) -> None:
    if wrong.any():
        found.problems.append(
            f'{int(wrong.sum())} annotations have a "{key}" {what} '
            f"(for example {_examples(rows, wrong, key)})"
        )


def _examples(rows: Sequence[dict[str, Any]], wrong: NDArray[Any], key: str) -> str:
    first = [rows[int(i)] for i in np.flatnonzero(wrong)[:EXAMPLES]]
    return ", ".join(f"id {row['id']} of image {row['image_id']}: {row[key]}" for row in first)
