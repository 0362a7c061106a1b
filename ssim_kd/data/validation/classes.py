"""Class counts and names of the data sets and of the student, which have to agree."""

from collections.abc import Sequence
from typing import Any

from detectron2.data import Metadata, MetadataCatalog
from detectron2.data.datasets.lvis import get_lvis_instances_meta

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
    key = needs.key("MODEL.SEM_SEG_HEAD.NUM_CLASSES")
    if needs.num_stuff is not None and classes and needs.num_stuff != len(classes):
        raise ValueError(
            f"{where} has {len(classes)} stuff_classes, but {key} is {needs.num_stuff}. Set {key} "
            f"to {len(classes)}."
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


def lvis_classes(where: str, name: str, json_file: str, ids: Sequence[Any]) -> tuple[str, ...]:
    """Classes of Detectron2's LVIS reader: those of its version, of which a file may have some."""
    try:
        meta = get_lvis_instances_meta(name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}: expected a name with 'v1' or 'v0.5'.") from None
    classes = meta["thing_classes"]
    known = meta.get("thing_dataset_id_to_contiguous_id", range(1, len(classes) + 1))
    unknown = [number for number in ids if number not in known]
    if unknown:
        raise ValueError(
            f'{where}: {json_file}: "categories" have the ids {unknown[:5]}, which are none of '
            f"the {len(classes)} classes of this version of LVIS."
        )
    return tuple(classes)


def check_metadata(where: str, name: str, json_file: str, names: list[str]) -> None:
    """Detectron2's reader sets these, and fails if they are set to something else."""
    meta = MetadataCatalog.get(name)
    given = meta.get("thing_classes")
    if given is not None and list(given) != names:
        raise ValueError(
            f"{where}: its metadata has {len(given)} thing_classes, {list(given)[:5]}, but "
            f"{json_file} has {len(names)} categories, {names[:5]} by id. Leave thing_classes out "
            "of the registration, or correct them."
        )


def check_ground_truth(
    where: str, name: str, json_file: str, content: dict[str, Any], records: Sequence[Any]
) -> None:
    """Compare json that is only ground truth with the records that code reads elsewhere."""
    meta = MetadataCatalog.get(name)
    strange = {r["image_id"] for r in records} - {image["id"] for image in content["images"]}
    if strange:
        raise ValueError(
            f"{where}: {json_file} does not have {len(strange)} of the {len(records)} images that "
            f'its records name by "image_id" (for example {next(iter(strange))!r}).'
        )
    ids = {c["id"]: c["name"] for c in content["categories"]}
    # Without this map Detectron2 takes class numbers for the file's ids.
    numbers = meta.get("thing_dataset_id_to_contiguous_id") or {i: i for i in range(len(ids))}
    classes = meta.get("thing_classes") or [ids[i] for i in sorted(ids)]
    expected = {i: classes[n] for i, n in numbers.items() if n < len(classes)}
    if sorted(numbers.values()) != list(range(len(ids))) or expected != ids:
        raise ValueError(
            f"{where}: its thing_classes and thing_dataset_id_to_contiguous_id say that the "
            f"categories of {json_file} are {expected}, but they are {ids}: detections would be "
            "scored as other classes. Correct the metadata, for example by thing_dataset_id_to_"
            f"contiguous_id={ {i: n for n, i in enumerate(sorted(ids))} }."
        )
