"""A mapper that names the image which cannot be read, and is seeded for every sample."""

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..sharing import without_queries
from .records import Record, Records

Mapper = Callable[[Record], Record | None]

# Pillow's modes with more than 8 bits a channel. Detectron2 would clip them to 255 in silence.
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
# Keys of a record that Detectron2's readers give paths of files.
_FILES = ("file_name", "sem_seg_file_name", "pan_seg_file_name")


class UnreadableImageError(OSError):
    """An image file is missing, empty, cut short, of another size, or of more than 8 bits."""


class CheckedMapper:
    """Calls a mapper, and turns what goes wrong into an error that names data set and file.

    Use it for testing as well: ``CheckedMapper(DatasetMapper(cfg, False), cfg.DATASETS.TEST)``.
    Around a custom mapper it assumes nothing of the record: neither that "file_name" is an
    image, nor that it is a file.

    Args:
        mapper: from a record of the data set to the model's input.
        names: the data sets that records may come from, for messages.
    """

    def __init__(self, mapper: Mapper, names: Sequence[str] = ()) -> None:
        self._mapper = mapper
        names = (names,) if isinstance(names, str) else names
        self._names = " or ".join(map(repr, names)) or "(unknown)"
        self._reads_images = reads_images(mapper)

    def __call__(self, record: Record) -> Record | None:
        """Map a record.

        Raises:
            UnreadableImageError: the image is at fault.
            RuntimeError: anything else; the cause is attached.
        """
        file_name = record.get("file_name") if isinstance(record, Mapping) else None
        if file_name is None:
            return self._mapper(record)
        shown = without_queries(str(file_name))
        where = f"Data set {self._names}: image {shown}"
        try:
            if self._reads_images:
                refuse_deep(file_name)
            return self._mapper(record)
        except UnreadableImageError as error:
            raise UnreadableImageError(f"{where}: {error}") from None
        except Exception as error:
            fault = _fault(file_name, error, decodes=self._reads_images)
            if fault is None:
                raise RuntimeError(f"{where}: the mapper failed: {error!r}") from error
            raise UnreadableImageError(f"{where}: {fault}") from error


def reads_images(mapper: Mapper | None) -> bool:
    """Whether a mapper reads image files as Detectron2's own does; None stands for that."""
    if mapper is None:
        return True
    return isinstance(mapper, DatasetMapper) and type(mapper).__call__ is DatasetMapper.__call__


def refuse_deep(file_name: str) -> None:
    """Raise if an image has more than 8 bits a channel; reads only its header (0.1 ms).

    Raises:
        UnreadableImageError: it has.
        OSError: the file does not exist, or is not an image.
    """
    with PathManager.open(file_name, "rb") as file, Image.open(file) as image:
        if image.mode in DEEP_MODES:
            raise UnreadableImageError(
                f"it has more than 8 bits a channel (mode {image.mode}), of which Detectron2 would "
                "clip all above 255. Convert it to 8 bits with the scaling that suits the data, or "
                "read it by a mapper of your own"
            )


def check_image_files(where: str, records: Sequence[Record]) -> None:
    """Check that all image files are there, and the header of the first, before any is read.

    Folders are listed rather than files looked up one by one. Paths with :// are skipped.

    Args:
        where: the key and the names of the sets, for the message.
        records: of Detectron2's format, mapped by its own mapper.

    Raises:
        FileNotFoundError: names how many are missing and the first of them.
        UnreadableImageError: the first image cannot be used.
    """
    if isinstance(records, Records):
        paths = records.names
    else:
        paths = [os.fspath(r[key]) for key in _FILES for r in records if key in r]
    paths = [path for path in paths if "://" not in path]
    listed: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listed:
            try:
                listed[folder] = set(os.listdir(folder or "."))
            except OSError:
                listed[folder] = set()
        # A folder may be readable only by name, or know another spelling of a name.
        if name not in listed[folder] and not os.path.isfile(path):
            missing.append(path)
    if missing:
        raise FileNotFoundError(
            f"{where}: {len(missing)} of {len(paths)} image files do not exist (for example "
            f"{missing[0]}). Correct the image folder or the file names, which are relative to it."
        )
    if paths and "file_name" in records[0]:
        try:
            refuse_deep(paths[0])
        except Exception as error:
            raise UnreadableImageError(
                f"{where}: the first image, {paths[0]}, cannot be used: {error}."
            ) from error


def _fault(file_name: str, error: Exception, *, decodes: bool) -> str | None:
    """Return what is wrong with a file, or None if it is not to blame.

    Args:
        file_name: of the record.
        error: of the mapper.
        decodes: whether the file is an image; a custom mapper may read any.
    """
    if not decodes:
        known = isinstance(error, OSError | utils.SizeMismatchError)
        return f"it cannot be read: {error}" if known else None
    if isinstance(error, utils.SizeMismatchError):
        return f"its size is not that of the annotations (EXIF rotation counts): {error}"
    try:
        if not PathManager.isfile(file_name):
            return "it does not exist"
        utils.read_image(file_name, "RGB")
    except MemoryError:
        raise
    except Exception as cause:
        return f"it cannot be decoded: {cause}"
    return None


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch's CPU generator, and put them back as they were afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed, which would seed every device as well.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
