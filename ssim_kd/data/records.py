"""The records of json files, serialised: one copy for all processes of a machine."""

import marshal
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode
from detectron2.utils import comm
from numpy.typing import NDArray

Record = dict[str, Any]

# Of each record: its range in the data, its objects' range among the classes, how many of them
# are not crowds, and how many keypoints are labelled.
_ROW = np.dtype(
    [(key, np.int64) for key in ("start", "end", "first", "last", "trainable", "visible")]
    + [("width", np.float64), ("height", np.float64)]
)
_ARRAYS = ("data", "rows", "classes")


@dataclass(frozen=True)
class Records(Sequence[Record]):
    """Records in Detectron2's format, each made when it is asked for.

    Attributes:
        data: all of them in Python's own format, without "bbox_mode"; bytes.
        rows: (K,) of each, what filters and samplers ask for: :data:`_ROW`.
        classes: (N,) class numbers of the objects.
        names: (K,) its file.
        sets: of each set its classes, by number: their names and the file's ids.
        zero_area: boxes of zero area, or outside their images.
    """

    data: NDArray[np.uint8]
    rows: NDArray[Any]
    classes: NDArray[np.int64]
    names: list[str]
    sets: dict[str, tuple[list[str], list[Any]]]
    zero_area: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.rows[index]
        record: Record = marshal.loads(self.data[row["start"] : row["end"]].data)
        for annotation in record["annotations"]:
            annotation["bbox_mode"] = BoxMode.XYWH_ABS
        return record

    def chosen(self, mask: NDArray[np.bool_]) -> "Records":
        """Those where the mask is True."""
        return replace(self, rows=self.rows[mask], names=list(compress(self.names, mask)))

    def write(self, folder: str) -> None:
        """Write them to files of a folder, for :meth:`map`."""
        for key in _ARRAYS:
            np.save(os.path.join(folder, key), getattr(self, key))
        with open(os.path.join(folder, "rest"), "wb") as file:
            pickle.dump((self.names, self.sets, self.zero_area), file)

    @classmethod
    def map(cls, folder: str) -> "Records":
        """Map what :meth:`write` wrote, which may then be unlinked."""
        arrays = [np.load(os.path.join(folder, f"{key}.npy"), mmap_mode="r") for key in _ARRAYS]
        with open(os.path.join(folder, "rest"), "rb") as file:
            return cls(*arrays, *pickle.load(file))


def concatenate(parts: Sequence[Records]) -> Records:
    """The records of several sets, one after the other."""
    if len(parts) == 1:
        return parts[0]
    rows, data, objects = [], 0, 0
    for part in parts:
        moved = part.rows.copy()
        for key, shift in (("start", data), ("end", data), ("first", objects), ("last", objects)):
            moved[key] += shift
        rows.append(moved)
        data, objects = data + len(part.data), objects + len(part.classes)
    return Records(
        np.concatenate([part.data for part in parts]),
        np.concatenate(rows),
        np.concatenate([part.classes for part in parts]),
        [name for part in parts for name in part.names],
        {name: classes for part in parts for name, classes in part.sets.items()},
        sum(part.zero_area for part in parts),
    )


def records_of(
    content: dict[str, Any], image_root: str, name: str, *, zero_area: int = 0
) -> Records:
    """Make what Detectron2's ``load_coco_json`` makes of a file without faults.

    Args:
        content: of the file; its annotations are taken out.
        image_root: folder of the images.
        name: of the set.
        zero_area: boxes of zero area in it.
    """
    categories = sorted(content["categories"], key=lambda c: c["id"])
    number = {category["id"]: i for i, category in enumerate(categories)}
    images = {image["id"]: image for image in content["images"]}
    of_image: dict[Any, list[dict[str, Any]]] = {key: [] for key in images}
    for annotation in content.pop("annotations", ()):
        if annotation["image_id"] in of_image:  # images may have been taken out of the file
            of_image[annotation["image_id"]].append(annotation)
    data, rows, names = bytearray(), [], []
    classes: list[int] = []
    for key in sorted(images):
        image = images[key]
        found = [obj for a in of_image.pop(key) if (obj := _object(a, number)) is not None]
        names.append(os.path.join(image_root, image["file_name"]))
        start, first = len(data), len(classes)
        data += marshal.dumps(
            {
                "file_name": names[-1],
                "height": image["height"],
                "width": image["width"],
                "image_id": image["id"],
                "annotations": found,
            }
        )
        classes += [row["category_id"] for row in found]
        trainable = sum(row.get("iscrowd", 0) == 0 for row in found)
        visible = sum(visible_keypoints(row) for row in found if "keypoints" in row)
        place = start, len(data), first, len(classes)
        rows.append((*place, trainable, visible, image["width"], image["height"]))
    return Records(
        np.frombuffer(data, dtype=np.uint8),
        np.array(rows, dtype=_ROW),
        np.array(classes, dtype=np.int64),
        names,
        {name: ([category["name"] for category in categories], list(number))},
        zero_area,
    )


def visible_keypoints(annotation: dict[str, Any]) -> int:
    """Return how many keypoints are labelled, as Detectron2 counts them."""
    return sum(v > 0 for v in (annotation.get("keypoints") or ())[2::3])


def _object(annotation: dict[str, Any], number: dict[Any, int]) -> dict[str, Any] | None:
    """An object of a record; None: Detectron2 leaves it out, for its polygons."""
    found = {"bbox": annotation["bbox"], "category_id": number[annotation["category_id"]]}
    if "iscrowd" in annotation:
        found["iscrowd"] = annotation["iscrowd"]
    if mask := annotation.get("segmentation"):
        if isinstance(mask, dict):
            if isinstance(mask["counts"], list):
                mask = mask_util.frPyObjects(mask, *mask["size"])
        else:
            mask = [points for points in mask if len(points) % 2 == 0 and len(points) >= 6]
            if not mask:
                return None
        found["segmentation"] = mask
    if "keypoints" in annotation:
        # From numbers of pixels to coordinates.
        points = annotation["keypoints"]
        found["keypoints"] = points and [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(points)]
    return found


def once(make: Callable[[], Any]) -> Any:
    """What the main process makes, for all processes, which must call it.

    Raises:
        Exception: that of the main process, in all.
    """
    found, error = None, None
    if comm.is_main_process():
        try:
            found = make()
        except Exception as raised:
            error = raised
    found, error = comm.all_gather((found, error))[0]
    if error is not None:
        raise error
    return found


def shared(make: Callable[[], Records | None]) -> Records | None:
    """Make records, or none, once on each machine, for all its processes, which must call it.

    Raises:
        Exception: that of the process which could not make them, in all.
    """
    if comm.get_world_size() == 1:
        return make()
    try:
        local, rank = comm.get_local_rank(), comm.get_rank()
    except AssertionError:
        # The user's own process group, without Detectron2's groups of machines: each reads.
        return make()
    records: Records | None = None
    with tempfile.TemporaryDirectory(prefix="ssim_kd_") as folder:
        found: str | Exception | None = folder
        if local == 0:
            try:
                records = make()
                if records is None:
                    found = None
                else:
                    records.write(folder)
            except Exception as error:
                found = error
        everywhere = comm.all_gather(found)
        for other in everywhere:
            if isinstance(other, Exception):
                raise other
        if local and everywhere[rank - local]:
            records = Records.map(everywhere[rank - local])
        comm.synchronize()  # a mapped file outlives its name
    return records
