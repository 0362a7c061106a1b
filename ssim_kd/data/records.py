"""The records of json files, serialised: one copy for all processes of a machine."""

import marshal
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode
from detectron2.utils import comm
from numpy.typing import NDArray

Record = dict[str, Any]


@dataclass(frozen=True)
class Records(Sequence[Record]):
    """Records in Detectron2's format, each made when it is asked for.

    Attributes:
        data: all of them in Python's own format, without "bbox_mode"; bytes.
        starts, ends: (K,) where each begins and ends.
        sizes: (K, 2) width and height of its image in pixels.
        objects: (K + 1,) where the objects of each begin in the next two.
        classes: (N,) class numbers of the objects.
        crowds: (N,) whether each is a crowd.
        zero_area: boxes of zero area, or outside their images.
        visible: (K,) labelled keypoints of each image.
        names: (K,) its file.
        sets: of each set its classes, by number: their names and the file's ids.
    """

    data: NDArray[np.uint8]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    sizes: NDArray[np.float64]
    objects: NDArray[np.int64]
    classes: NDArray[np.int64]
    crowds: NDArray[np.bool_]
    visible: NDArray[np.int64]
    names: list[str]
    sets: dict[str, tuple[list[str], list[Any]]]
    zero_area: int = 0

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        record: Record = marshal.loads(self.data[self.starts[index] : self.ends[index]].data)
        for annotation in record["annotations"]:
            annotation["bbox_mode"] = BoxMode.XYWH_ABS
        return record

    def outline(self) -> list[Record]:
        """Width, height and classes alone of each record, for samplers."""
        # One object a class: none is changed.
        known = [{"category_id": i} for i in range(self.classes.max(initial=-1) + 1)]
        objects = [known[i] for i in self.classes.tolist()]
        ends = self.objects.tolist()
        return [
            {"width": w, "height": h, "annotations": objects[start:end]}
            for (w, h), start, end in zip(self.sizes.tolist(), ends, ends[1:], strict=False)
        ]

    def chosen(self, mask: NDArray[np.bool_]) -> "Records":
        """Those where the mask is True."""
        if mask.all():
            return self
        counts = np.diff(self.objects)
        of_objects = np.repeat(mask, counts)
        return replace(
            self,
            starts=self.starts[mask],
            ends=self.ends[mask],
            sizes=self.sizes[mask],
            objects=_offsets(counts[mask]),
            classes=self.classes[of_objects],
            crowds=self.crowds[of_objects],
            visible=self.visible[mask],
            names=[name for name, kept in zip(self.names, mask.tolist(), strict=True) if kept],
        )

    def with_objects(self) -> NDArray[np.bool_]:
        """(K,) whether an image has an object that is not a crowd."""
        owners = np.repeat(np.arange(len(self)), np.diff(self.objects))
        return np.bincount(owners[~self.crowds], minlength=len(self)) > 0

    def write(self, path: str) -> str:
        """Write them to a file for :meth:`map`. Returns its path."""
        arrays = {k: v for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        rest = {k: v for k, v in vars(self).items() if k not in arrays}
        with open(path, "wb") as file:
            head = pickle.dumps((rest, {k: (v.dtype.str, v.shape) for k, v in arrays.items()}), -1)
            file.write(len(head).to_bytes(8, "little") + head)
            for array in arrays.values():
                file.write(b"\0" * (-file.tell() % 8))
                file.write(np.ascontiguousarray(array).data)
        return path

    @classmethod
    def map(cls, path: str) -> "Records":
        """Map what :meth:`write` wrote, which may then be unlinked."""
        with open(path, "rb") as file:
            rest, arrays = pickle.loads(file.read(int.from_bytes(file.read(8), "little")))
            place = file.tell()
        found: dict[str, Any] = {}
        for key, (dtype, shape) in arrays.items():
            place += -place % 8
            kind = np.dtype(dtype)
            count = int(np.prod(shape))
            found[key] = (
                np.memmap(path, kind, "r", place, shape) if count else np.zeros(shape, kind)
            )
            place += count * kind.itemsize
        return cls(**rest, **found)


def concatenate(parts: Sequence[Records]) -> Records:
    """The records of several sets, one after the other."""
    if len(parts) == 1:
        return parts[0]
    shift = np.cumsum([0, *(len(part.data) for part in parts)]).tolist()
    one = parts[0]
    return replace(
        one,
        data=np.concatenate([part.data for part in parts]),
        starts=np.concatenate([p.starts + s for p, s in zip(parts, shift, strict=False)]),
        ends=np.concatenate([p.ends + s for p, s in zip(parts, shift, strict=False)]),
        objects=_offsets(np.concatenate([np.diff(part.objects) for part in parts])),
        names=[name for part in parts for name in part.names],
        sets={name: classes for part in parts for name, classes in part.sets.items()},
        zero_area=sum(part.zero_area for part in parts),
        **{
            key: np.concatenate([getattr(part, key) for part in parts])
            for key in ("sizes", "classes", "crowds", "visible")
        },
    )


def records_of(content: dict[str, Any], image_root: str, name: str) -> Records:
    """Make what Detectron2's ``load_coco_json`` makes of a file without faults.

    Args:
        content: of the file; its annotations are taken out.
        image_root: folder of the images.
        name: of the set.
    """
    categories = sorted(content["categories"], key=lambda c: c["id"])
    number = {category["id"]: i for i, category in enumerate(categories)}
    images = {image["id"]: image for image in content["images"]}
    of_image: dict[Any, list[dict[str, Any]]] = {key: [] for key in images}
    for annotation in content.pop("annotations", ()):
        if annotation["image_id"] in of_image:  # images may have been taken out of the file
            of_image[annotation["image_id"]].append(annotation)
    data, ends, names, sizes, visible = bytearray(), [], [], [], []
    classes: list[int] = []
    crowds: list[bool] = []
    counts = []
    for key in sorted(images):
        image = images[key]
        rows = [obj for a in of_image.pop(key) if (obj := _object(a, number)) is not None]
        record = {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": rows,
        }
        data += marshal.dumps(record)
        ends.append(len(data))
        names.append(record["file_name"])
        sizes.append((record["width"], record["height"]))
        counts.append(len(rows))
        classes += [row["category_id"] for row in rows]
        crowds += [row.get("iscrowd", 0) != 0 for row in rows]
        points = [row["keypoints"] for row in rows if row.get("keypoints")]
        visible.append(sum(v > 0 for row in points for v in row[2::3]))
    return Records(
        data=np.frombuffer(data, dtype=np.uint8),
        starts=np.array([0, *ends[:-1]]),
        ends=np.array(ends),
        sizes=np.array(sizes, dtype=np.float64),
        objects=_offsets(np.array(counts)),
        classes=np.array(classes, dtype=np.int64),
        crowds=np.array(crowds, dtype=bool),
        visible=np.array(visible),
        names=names,
        sets={name: ([category["name"] for category in categories], list(number))},
    )


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


def shared(make: Callable[[], Records | None]) -> Records | None:
    """Make records, or none, once on each machine, for all its processes, which must call it.

    Raises:
        Exception: that of the process which could not make them, in all.
    """
    if comm.get_world_size() == 1:
        return make()
    local, rank = comm.get_local_rank(), comm.get_rank()
    records: Records | None = None
    with tempfile.TemporaryDirectory(prefix="ssim_kd_") as folder:
        path: str | Exception | None = os.path.join(folder, "records")
        if local == 0:
            try:
                records = make()
                path = records.write(str(path)) if records is not None else None
            except Exception as error:
                path = error
        paths = comm.all_gather(path)
        for found in paths:
            if isinstance(found, Exception):
                raise found
        if local and paths[rank - local] is not None:
            records = Records.map(paths[rank - local])
        comm.synchronize()  # a mapped file outlives its name
    return records


def _offsets(counts: NDArray[Any]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
