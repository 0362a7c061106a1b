"""What training and COCO's evaluation ask of annotations beside their boxes."""

from collections.abc import Sequence
from typing import Any

Annotation = dict[str, Any]


def inspect_scoring(annotations: Sequence[Annotation]) -> list[str]:
    """What keeps boxes from being scored: COCO's evaluation reads two more keys of each.

    Args:
        annotations: each with "id" and "image_id".

    Returns:
        one sentence a key that is missing; none if all can be scored.
    """
    problems = []
    for key, advice in (
        ("iscrowd", 'add "iscrowd": 0'),
        ("area", 'add "area" in pixels: width * height, or that of the mask'),
    ):
        wrong = [a for a in annotations if not isinstance(a.get(key), int | float)]
        if wrong:
            problems.append(
                f'{len(wrong)} of {len(annotations)} annotations have no "{key}" that is a number '
                f"(for example {_name(wrong[0])}), which COCO's evaluation needs: {advice}."
            )
    return problems


def inspect_masks(annotations: Sequence[Annotation]) -> tuple[list[str], list[str], list[str]]:
    """What is wrong with "segmentation", as Detectron2 0.6 and main treat it.

    Returns:
        what keeps the set from training at all, from training masks, and from scoring masks; a
        sentence each.
    """
    none = [a for a in annotations if not a.get("segmentation")]
    invalid = [a for a in annotations if a.get("segmentation") and not _usable(a["segmentation"])]
    training, masks, scoring = [], [], []
    if invalid and len(invalid) == len(annotations):
        training.append(
            f"The polygons of all {len(invalid)} annotations have fewer than three points (for "
            f"example {_name(invalid[0])}), and Detectron2 leaves such annotations out: correct "
            '"segmentation", or leave the key out where there are boxes alone.'
        )
    # Crowds are not trained on.
    unmasked = [a for a in none if not a.get("iscrowd", 0)]
    if unmasked:
        masks.append(_without_masks(unmasked, annotations))
    if none or invalid:
        scoring.append(_without_masks([*none, *invalid], annotations))
    return training, masks, scoring


def _without_masks(wrong: Sequence[Annotation], annotations: Sequence[Annotation]) -> str:
    return (
        f'{len(wrong)} of {len(annotations)} annotations have no usable "segmentation" (for '
        f"example {_name(wrong[0])}), but MODEL.MASK_ON is True: add it, or set MODEL.MASK_ON to "
        "False."
    )


def _usable(segmentation: Any) -> bool:
    """Whether it is a run-length encoding, or has a polygon of three points or more."""
    if not isinstance(segmentation, list):
        return isinstance(segmentation, dict)
    return any(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in segmentation)


def _name(annotation: Annotation) -> str:
    return f"id {annotation['id']} of image {annotation['image_id']}"
