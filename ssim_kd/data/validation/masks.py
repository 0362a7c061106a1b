"""Masks of annotations, as Detectron2's reader and pycocotools take them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..needs import Needs
from .annotations import Annotation, are_numbers, told
from .findings import Findings

# Kinds of "segmentation": of each, what Detectron2's reader does with the annotation.
NONE = "none"  # keeps it without a mask
POLYGONS = "polygons"
PARTLY = "partly"  # leaves out those of its polygons that have fewer than three points
SHORT = "short"  # leaves the annotation out, box and all
RLE = "rle"
OTHER_SIZE = "other size"  # a run-length encoding that is not of the image's size
MALFORMED = "malformed"  # fails, or leaves it out

# pycocotools walks along a polygon pixel by pixel: no image is as large.
FARTHEST = 10**6

# Bits of a run: pycocotools' own are of 32, and longer ones take quadratic time.
_LONGEST = 64


def segmentation_kind(segmentation: Any, height: Any, width: Any) -> tuple[str, str]:
    """Return the kind of a "segmentation", and what is wrong with it (empty: nothing).

    Args:
        segmentation: polygons ``[[x1, y1, x2, y2, ...], ...]``, a run-length encoding
            ``{"size": [height, width], "counts": ...}``, or whatever the file has.
        height, width: of the image in pixels.
    """
    if isinstance(segmentation, dict):
        return _rle_kind(segmentation, height, width) if segmentation else (NONE, "")
    if isinstance(segmentation, np.ndarray):
        return MALFORMED, "is an array, which Detectron2 does not take: encode it"
    if not isinstance(segmentation, list | tuple):
        return (MALFORMED, f"is a {type(segmentation).__name__}") if segmentation else (NONE, "")
    if not segmentation:
        return NONE, ""
    valid = pairs = 0
    for polygon in segmentation:
        points = polygon.tolist() if isinstance(polygon, np.ndarray) else polygon
        if not isinstance(points, list | tuple):
            return MALFORMED, "is not a list of polygons [[x1, y1, x2, y2, ...]]"
        if not are_numbers(points):
            return MALFORMED, "has a polygon that is not a list of finite numbers"
        if points and max(max(points), -min(points)) > FARTHEST:
            return MALFORMED, f"has a polygon with a coordinate beyond {FARTHEST} pixels"
        valid += len(points) >= 6 and len(points) % 2 == 0
        pairs += len(points) == 2
    if pairs == len(segmentation) > 2:
        return MALFORMED, "has points as pairs, not polygons [[x1, y1, x2, y2, ...]]"
    short = "has polygons of fewer than three points"
    if not valid:
        return SHORT, short
    return (POLYGONS, "") if valid == len(segmentation) else (PARTLY, short)


def _rle_kind(rle: Annotation, height: Any, width: Any) -> tuple[str, str]:
    size, counts = rle.get("size"), rle.get("counts")
    if not (isinstance(size, list | tuple) and len(size) == 2 and are_numbers(size)):
        return MALFORMED, 'is a run-length encoding without "size": [height, width]'
    if isinstance(counts, str | bytes):
        runs = _decompressed(counts)
    elif isinstance(counts, list) and set(map(type, counts)) <= {int}:
        runs = counts
    else:
        return MALFORMED, 'is a run-length encoding without "counts"'
    # pycocotools does not look, and may take minutes or read what lies after.
    if sum(runs) != size[0] * size[1] or min(runs) < 0:
        return MALFORMED, 'has "counts" whose sum is not height * width'
    if tuple(size) != (height, width):
        return OTHER_SIZE, f'has "size" {list(size)}, but the image has [{height}, {width}]'
    return RLE, ""


def _decompressed(counts: str | bytes) -> list[int]:
    """Return the runs of a compressed encoding; [-1] if it is none.

    COCO's format: 5 bits a character from "0" on, least first, with a bit for more and a sign; from
    the fourth on a run is the difference to the one before the last.
    """
    runs: list[int] = []
    value = shift = 0
    for code in counts.encode("latin-1", "replace") if isinstance(counts, str) else counts:
        bits = code - 48
        if not 0 <= bits < 64:
            return [-1]
        value |= (bits & 31) << shift
        shift += 5
        if shift > _LONGEST:
            return [-1]
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return [-1] if shift or not runs else runs


def inspect_masks(
    found: Findings,
    annotations: Sequence[Annotation],
    sizes: Sequence[tuple[Any, Any]],
    needs: Needs,
) -> None:
    """Find what is wrong with "segmentation".

    Args:
        found: takes it.
        annotations: each with "id" and "image_id".
        sizes: (height, width) of each one's image.
        needs: of the student.
    """
    if not needs.masks and not any(a.get("segmentation") for a in annotations):
        return
    by_kind: dict[str, list[tuple[Annotation, str]]] = {}
    for annotation, size in zip(annotations, sizes, strict=True):
        kind, fault = segmentation_kind(annotation.get("segmentation"), *size)
        if kind != POLYGONS:
            by_kind.setdefault(kind, []).append((annotation, fault))

    def several(*kinds: str, crowds: bool = True) -> list[tuple[Annotation, str]]:
        pairs = [pair for kind in kinds for pair in by_kind.get(kind, ())]
        return [pair for pair in pairs if crowds or not pair[0].get("iscrowd", 0)]

    found.problems += told(several(MALFORMED), 'have a "segmentation" that cannot be read')
    short = several(SHORT)
    if len(short) < len(annotations):
        found.notes += told(short, "are left out by Detectron2")
    else:
        advice = ": correct it, or leave the key out if there are only boxes."
        found.untrainable += told(
            short, 'are all left out by Detectron2 for their "segmentation"', advice
        )
    if not needs.masks:
        return
    found.notes += told(several(PARTLY), "lose a part of their masks")
    advice = f", but {needs.key('MODEL.MASK_ON')} is True: correct it, or learn no masks."
    # Crowds are scored, but not trained on.
    for sentences, wrong in (
        (found.untrainable, several(NONE, OTHER_SIZE, crowds=False)),
        (found.unscorable, several(NONE, SHORT, PARTLY, OTHER_SIZE)),
    ):
        sentences += told(wrong, 'have no usable "segmentation"', advice)
    if needs.mask_format == "polygon":
        advice = f", but {needs.key('INPUT.MASK_FORMAT')} is 'polygon': set it to 'bitmask'."
        found.untrainable += told(several(RLE, crowds=False), "have run-length encodings", advice)
