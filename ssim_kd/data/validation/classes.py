"""Class counts and names of the data sets and of the student, which have to agree."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import Metadata

_BOXES = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}
_STUFF = ("PanopticFPN", "SemanticSegmentor")


def _architecture(cfg: CfgNode) -> str:
    name: str = cfg.MODEL.META_ARCHITECTURE
    return cfg.MODEL.DISTILL.STUDENT_META_ARCHITECTURE if name == "DistilledDetector" else name


def num_classes_key(cfg: CfgNode) -> str | None:
    """Return the config key that holds the student's class count, or None if it has none."""
    return _BOXES.get(_architecture(cfg))


def learns_masks(cfg: CfgNode) -> bool:
    """Whether the student predicts masks: ``MODEL.MASK_ON``, which RetinaNet does not read."""
    return bool(cfg.MODEL.MASK_ON) and num_classes_key(cfg) == "MODEL.ROI_HEADS.NUM_CLASSES"


def num_classes(cfg: CfgNode) -> int | None:
    """Return the student's class count, or None if it has none."""
    key = num_classes_key(cfg)
    if key is None:
        return None
    value = cfg
    for part in key.split("."):
        value = value[part]
    return int(value)


def check_classes(cfg: CfgNode, where: str, classes: Sequence[str]) -> None:
    """Compare a data set's class count with the student's.

    Raises:
        ValueError: they differ.
    """
    key, value = num_classes_key(cfg), num_classes(cfg)
    if key is not None and value != len(classes):
        shown = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
        raise ValueError(
            f"{where} has {len(classes)} categories ({shown}), but {key} is {value}. "
            f"Set {key} to {len(classes)}."
        )


def check_stuff_classes(cfg: CfgNode, where: str, classes: Sequence[str]) -> None:
    """Compare the count of a data set's semantic classes with the student's, where it has some.

    Raises:
        ValueError: they differ.
    """
    value = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if _architecture(cfg) in _STUFF and classes and value != len(classes):
        raise ValueError(
            f"{where} has {len(classes)} stuff_classes, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is "
            f"{value}. Set it to {len(classes)}."
        )


def check_keypoint_names(cfg: CfgNode, where: str, meta: Metadata) -> None:
    """Check what Detectron2's mapper reads to flip keypoints, where the student predicts some.

    Raises:
        ValueError: the metadata does not have it.
    """
    if not cfg.MODEL.KEYPOINT_ON:
        return
    names, pairs = meta.get("keypoint_names"), meta.get("keypoint_flip_map")
    count = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    known = names is not None and pairs is not None
    if not known or len(names) != count or not {n for pair in pairs for n in pair} <= set(names):
        raise ValueError(
            f"{where} has the keypoint_names {names} and the keypoint_flip_map {pairs} in its "
            f"metadata, but MODEL.KEYPOINT_ON is True: expected {count} names (MODEL."
            "ROI_KEYPOINT_HEAD.NUM_KEYPOINTS) and pairs of them that a flip swaps: "
            f"MetadataCatalog.get({meta.name!r}).set(keypoint_names=[...], keypoint_flip_map="
            "[('left', 'right'), ...])."
        )


def check_same_classes(cfg: CfgNode, classes: dict[str, Sequence[str]]) -> None:
    """A class must have the same number in every set, or training learns them mixed up.

    Args:
        cfg: of the student.
        classes: names by data set, in the order of their numbers.

    Raises:
        ValueError: two sets differ.
    """
    if num_classes_key(cfg) is None or len(classes) < 2:
        return
    first, *others = classes
    for other in others:
        if list(classes[other]) != list(classes[first]):
            pairs = zip(classes[first], classes[other], strict=False)
            number, differs = next(
                ((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1]), (0, ("", ""))
            )
            raise ValueError(
                f"DATASETS: {first!r} and {other!r} have different categories or order (by id): "
                f"class {number} is {differs[0]!r} in the one and {differs[1]!r} in the other. "
                "Expected the same."
            )
