"""A loader that resumes exactly: the same images, the same augmentation."""

import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from detectron2.utils import comm
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from .mapper import Mapper, UnreadableImageError, seeded
from .records import Record
from .samplers import Draw, batch_order, sample_seed
from .workers import batches

logger = logging.getLogger(__name__)

# Key under which a sample carries the files that it replaces; taken out before the model sees it.
_SKIPPED = "_skipped_files"
# Images tried in the place of one that cannot be read.
MAX_REPLACEMENTS = 20


class TrainLoader:
    """Iterates over the batches of this rank without end: lists of the mapper's outputs.

    The order of images and the random numbers of the mapper depend only on ``seed``, the number of
    the iteration and the number of ranks, not on the number of workers or on earlier
    interruptions. Workers start when the first batch is asked for; until then :meth:`resume` may
    change where it begins. A mapper that keeps state between calls is not resumable.

    Attributes:
        seed: of order and augmentation. Save it (:meth:`state_dict`) where SEED is negative.
        start_iter: number of the first batch.
        skipped: image files that could not be read, and how often each was met.
    """

    def __init__(
        self,
        records: Any,
        mapper: Mapper,
        indices: Callable[[int], Iterable[int]],
        batch_size: int,
        *,
        groups: NDArray[np.int64] | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
        start_iter: int = 0,
        skip_corrupt: bool = False,
        num_classes: int | None = None,
    ) -> None:
        self.seed = seed
        self.start_iter = start_iter
        self.skipped: Counter[str] = Counter()
        world_size = comm.get_world_size()
        self._batch_size = batch_size // world_size
        self._num_workers = num_workers
        self._groups = groups
        self._shape = {"images": len(records), "batch": batch_size, "processes": world_size}
        self._mapper, self._indices = mapper, indices
        self._collate = partial(_collate, collate_fn)
        self._skip = skip_corrupt
        self._num_classes = num_classes
        self._records = records
        self._started = False

    def state_dict(self) -> dict[str, int]:
        """Return plain integers for the checkpoint, from which :meth:`resume` goes on."""
        return {"seed": int(self.seed), **self._shape}

    def resume(self, start_iter: int, state: dict[str, int] | None = None) -> None:
        """Begin at an iteration, with the seed of the interrupted run.

        If the number of images, of processes or the batch size differ from the interrupted run's,
        the order of images differs too: a warning says so.

        Args:
            start_iter: number of the first batch, >= 0.
            state: from :meth:`state_dict` of the interrupted run. None keeps the seed.

        Raises:
            RuntimeError: batches have been taken already.
        """
        if self._started:
            raise RuntimeError("resume() must be called before the first batch is taken.")
        self.start_iter = start_iter
        if state is None:
            return
        self.seed = int(state["seed"])
        for key, now in self._shape.items():
            if state.get(key, now) != now:
                logger.warning(
                    "The interrupted run had %s = %s, this one has %s: from here on the order of "
                    "images is not that of an uninterrupted run.",
                    key,
                    state[key],
                    now,
                )

    def __iter__(self) -> Generator[list[Record], None, None]:
        # A generator: nothing below runs before the first batch is asked for.
        self._started = True
        order = batch_order(
            self._indices(self.seed),
            self._batch_size,
            groups=self._groups,
            start_iter=self.start_iter,
        )
        # With a separate generator the loader does not use the global one.
        loader: DataLoader[Record] = DataLoader(
            _Samples(self._records, self._mapper, self.seed, self._skip, self._num_classes),
            batch_sampler=order,  # type: ignore[arg-type]
            num_workers=self._num_workers,
            collate_fn=self._collate,
            generator=torch.Generator().manual_seed(self.seed),
        )
        with closing(batches(loader)) as found:
            for skipped, batch in found:
                for message in skipped:
                    self._note(message)
                yield batch

    def _note(self, message: str) -> None:
        if message not in self.skipped:
            logger.warning("Skipped, and another image taken instead: %s", message)
        self.skipped[message] += 1

    def log_skipped(self) -> None:
        """Log what was skipped so far on this rank; nothing if nothing was."""
        if self.skipped:
            lines = "\n".join(f"  {n} x {message}" for message, n in self.skipped.most_common())
            logger.warning(
                "%d images could not be read (%d times):\n%s",
                len(self.skipped),
                self.skipped.total(),
                lines,
            )


@dataclass
class _Samples(Dataset[Record]):
    """Maps a draw (index, position) to the model's input, seeded by the position."""

    records: Any
    mapper: Mapper
    seed: int
    skip: bool
    num_classes: int | None

    def __post_init__(self) -> None:
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()

    def __getitem__(self, draw: Draw) -> Record:
        index, position = draw
        position = position * self.world_size + self.rank
        skipped: list[str] = []
        for attempt in range(1 + MAX_REPLACEMENTS):
            seed = sample_seed(self.seed, position, attempt)
            if attempt:
                index = seed % len(self.records)
            with seeded(seed):
                try:
                    record = self.mapper(self.records[index])
                except UnreadableImageError as error:
                    if not self.skip:
                        raise
                    skipped.append(str(error))
                    continue
            if record is not None:  # None: the mapper itself asks for another image
                self._check_classes(record)
                if skipped and isinstance(record, dict):
                    record[_SKIPPED] = skipped
                return record
        raise UnreadableImageError(
            f"{MAX_REPLACEMENTS + 1} images in a row could not be used. The last: "
            f"{skipped[-1] if skipped else 'the mapper returned None'}"
        )

    def _check_classes(self, record: Any) -> None:
        """A class beyond the student's would be learned as background, in silence."""
        instances = record.get("instances") if isinstance(record, dict) else None
        if self.num_classes is None or not isinstance(instances, Instances):
            return
        classes = set(instances.gt_classes.tolist()) if instances.has("gt_classes") else set()
        if not classes <= set(range(self.num_classes)):
            raise ValueError(
                f"The mapper gives {record.get('file_name', 'a record')} the gt_classes "
                f"{sorted(classes)}: expected numbers in [0, {self.num_classes}), "
                "the student's class count."
            )


def _collate(
    function: Callable[[list[Any]], Any] | None, samples: list[Any]
) -> tuple[list[str], Any]:
    """Take out what was skipped, and make a batch of the rest."""
    # A custom mapper may return something else than a dictionary.
    skipped = [m for s in samples if isinstance(s, dict) for m in s.pop(_SKIPPED, ())]
    return skipped, samples if function is None else function(samples)
