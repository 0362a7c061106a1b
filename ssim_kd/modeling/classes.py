"""How many classes a built detector predicts: the model is asked, and no config key."""

from collections.abc import Iterator
from typing import Any, TypeGuard

from torch import nn

from .plain_names import unwrap


def num_classes(model: nn.Module) -> int | None:
    """The number of thing classes that a detector predicts, background left out.

    It is read from the attribute ``num_classes`` that Detectron2's detectors and heads have: of
    the detector (RetinaNet, FCOS), of ``roi_heads`` (R-CNN, cascades), else of any part, if all
    that have one agree.

    Args:
        model: a student, a teacher or a DistilledDetector, wrapped or not.

    Returns:
        None if it predicts no classes (a proposal network, a semantic segmentation), or does not
        say how many.
    """
    detector: Any = unwrap(model)
    detector = detector._modules.get("student", detector)
    for part in (detector, getattr(detector, "roi_heads", None)):
        count = getattr(part, "num_classes", None)
        if _is_count(count):
            return count
    found = {int(part.num_classes) for part in _parts(detector)}
    return found.pop() if len(found) == 1 else None


def _parts(detector: nn.Module) -> Iterator[Any]:
    for name, part in detector.named_modules():
        # A mask head of one class is class-agnostic.
        other = any(word in name for word in ("sem_seg", "mask", "keypoint"))
        if not other and _is_count(getattr(part, "num_classes", None)):
            yield part


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
