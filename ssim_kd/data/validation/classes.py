"""Class counts and names of the data sets and of the student, which have to agree."""

from collections.abc import Sequence

from detectron2.data import Metadata

from ..needs import Needs


def check_classes(needs: Needs, where: str, classes: Sequence[str]) -> None:
    """Compare a data set's class count with the student's.

    Raises:
        ValueError: they differ.
    """
    key, value = needs.num_classes_key, needs.num_classes
    if value is not None and value != len(classes):
        shown = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
        raise ValueError(
            f"{where} has {len(classes)} categories ({shown}), but {key} is {value}. "
            f"Set {key} to {len(classes)}."
        )


def check_stuff_classes(needs: Needs, where: str, classes: Sequence[str]) -> None:
    """Compare the count of a data set's semantic classes with the student's, if it has some.

    Raises:
        ValueError: they differ.
    """
    if needs.num_stuff is not None and classes and needs.num_stuff != len(classes):
        raise ValueError(
            f"{where} has {len(classes)} stuff_classes, but "
            f"{needs.key('MODEL.SEM_SEG_HEAD.NUM_CLASSES')} is {needs.num_stuff}. Set it to "
            f"{len(classes)}."
        )


def check_keypoint_names(needs: Needs, where: str, meta: Metadata) -> None:
    """Check what Detectron2's mapper reads to flip keypoints, if the student predicts some.

    Raises:
        ValueError: the metadata does not have it.
    """
    if not needs.keypoints:
        return
    names, pairs = meta.get("keypoint_names"), meta.get("keypoint_flip_map")
    count = needs.keypoints
    known = names is not None and pairs is not None
    if not known or len(names) != count or not {n for pair in pairs for n in pair} <= set(names):
        raise ValueError(
            f"{where} has the keypoint_names {names} and the keypoint_flip_map {pairs} in its "
            f"metadata, but {needs.key('MODEL.KEYPOINT_ON')} is True: expected {count} names "
            f"({needs.key('MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS')}) and pairs of them that a flip "
            "swaps: "
            f"MetadataCatalog.get({meta.name!r}).set(keypoint_names=[...], keypoint_flip_map="
            "[('left', 'right'), ...])."
        )


def check_same_classes(needs: Needs, classes: dict[str, Sequence[str]]) -> None:
    """A class must have the same number in every set, or training learns them mixed up.

    Args:
        needs: of the student.
        classes: names by data set, in the order of their numbers.

    Raises:
        ValueError: two sets differ.
    """
    if needs.num_classes is None or len(classes) < 2:
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
