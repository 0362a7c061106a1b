"""The classes of the data sets and of the student have to be the same."""

from detectron2.config import CfgNode


def num_classes_key(cfg: CfgNode) -> str | None:
    """Return the config key that holds the student's class count, or None if it has none."""
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture == "DistilledDetector":
        architecture = cfg.MODEL.DISTILL.STUDENT_META_ARCHITECTURE
    return {
        "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
        "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
        "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    }.get(architecture)


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


def check_classes(cfg: CfgNode, where: str, classes: list[str]) -> None:
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


def check_same_classes(cfg: CfgNode, classes: dict[str, list[str]]) -> None:
    """A class must have the same number in every set, or training learns them mixed up.

    Args:
        cfg: of the student.
        classes: names by data set, in the order of their ids.

    Raises:
        ValueError: two sets differ.
    """
    if num_classes_key(cfg) is None or len(classes) < 2:
        return
    first, *others = classes
    for other in others:
        if classes[other] != classes[first]:
            pairs = zip(classes[first], classes[other], strict=False)
            differs = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
            raise ValueError(
                f"DATASETS: {first!r} and {other!r} have different categories or order (by id): "
                f"{differs[0]!r} in the one is {differs[1]!r} in the other. Expected the same."
            )
