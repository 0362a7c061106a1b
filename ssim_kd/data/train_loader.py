"""A training loader that can be resumed exactly: ``build_train_loader(cfg, start_iter=...)``."""

import copy
import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog, DatasetFromList, DatasetMapper
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.structures import Instances
from detectron2.utils import comm
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from .coco import reads_json_file
from .mapper import (
    CheckedMapper,
    Mapper,
    Record,
    UnreadableImageError,
    check_image_files,
    reads_images,
    seeded,
)
from .needs import Needs
from .records import Records
from .samplers import BatchOrder, Draw, aspect_groups, index_stream, sample_seed
from .training_sets import records_needed
from .validation import check_records_for_mapper
from .workers import batches

logger = logging.getLogger(__name__)

# Key under which a sample carries the files that it replaces; taken out before the model sees it.
_SKIPPED = "_skipped_files"
# Images tried in the place of one that cannot be read.
MAX_REPLACEMENTS = 20


class TrainLoader:
    """Iterates over the batches of this rank, for ever: lists of the mapper's outputs.

    The order of images and the random numbers of the mapper depend on ``seed``, the number of the
    iteration and the number of ranks alone: not on the number of workers, nor on where the run was
    interrupted. Workers start when the first batch is asked for; until then :meth:`resume` may
    change where it begins. A mapper that keeps a state of its own between calls is not resumable.

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
        self._mapper, self._indices, self._collate = mapper, indices, _Collate(collate_fn)
        self._skip = skip_corrupt
        self._num_classes = num_classes
        self._records = records
        self._started = False

    def state_dict(self) -> dict[str, int]:
        """Return plain integers for the checkpoint, from which :meth:`resume` goes on."""
        return {"seed": int(self.seed), **self._shape}

    def resume(self, start_iter: int, state: dict[str, int] | None = None) -> None:
        """Begin at an iteration, with the seed of the interrupted run.

        Where the number of images, of processes or the batch size differ from the interrupted
        run's, the order of images differs as well: a warning says so.

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
        order = BatchOrder(
            self._indices(self.seed),
            self._batch_size,
            groups=self._groups,
            start_iter=self.start_iter,
        )
        # With a generator of its own the loader leaves the global one alone.
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


def _from_config(
    cfg: CfgNode,
    *,
    mapper: Mapper | None = None,
    dataset: Sequence[Record] | None = None,
    seed: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    needs = Needs.from_config(cfg)
    # check_datasets has seen what json files hold.
    seen = all(n in DatasetCatalog and reads_json_file(n) for n in needs.train)
    checked = dataset is None and seen
    if dataset is None:
        dataset = records_needed(needs)
    if "sampler" not in options and _is_map_style(dataset):
        options["sampler"] = index_stream(cfg, _outline(dataset))
    return {
        "dataset": dataset,
        "mapper": mapper or DatasetMapper(cfg, True),
        "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "aspect_ratio_grouping": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "seed": cfg.SEED if seed is None and cfg.SEED >= 0 else seed,
        "skip_corrupt": cfg.DATALOADER.SKIP_CORRUPT,
        "needs": needs,
        "checked": checked,
        **options,
    }


@configurable(from_config=_from_config)
def build_train_loader(
    dataset: Any,
    *,
    mapper: Mapper,
    sampler: Any = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    seed: int | None = None,
    start_iter: int = 0,
    skip_corrupt: bool = False,
    needs: Needs | None = None,
    checked: bool = False,
) -> TrainLoader:
    """Build the training loader of this rank. Every rank must call it.

    It takes what Detectron2's ``build_detection_train_loader`` takes, or a config:
    ``build_train_loader(cfg)``, with any of the arguments as well.

    Args:
        dataset: the records: a list, or what has a length and items.
        mapper: from a record of the data set to the model's input, as Detectron2's is; it may read
            any kind of file, and returns None to ask for another record. Files and annotations are
            checked here for Detectron2's own.
        sampler: a sampler of Detectron2, of which all but the seed is taken, or a function from a
            seed to an endless stream of this rank's indices. None: ``TrainingSampler``.
        total_batch_size: images of all ranks in a step.
        aspect_ratio_grouping: whether a batch has only wide or only tall images.
        num_workers: of this rank.
        collate_fn: makes a batch of a list; None leaves the list as it is.
        seed: of order and augmentation, >= 0. None: a random one that all ranks share; with a
            config, ``cfg.SEED`` unless that is negative.
        start_iter: number of the first batch, >= 0: batches before it are skipped unread.
        skip_corrupt: whether another image is taken for one that cannot be read.
        needs: of the student, for the checks.
        checked: whether the annotations were checked before.

    Raises:
        ValueError: an unknown sampler, a batch size that the ranks cannot share, or records that
            cannot be read or mapped.
        OSError: an image file is missing, or the first unusable, unless ``skip_corrupt``.
        TypeError: the data set has no length, or no items.
    """
    needs = needs or Needs()
    world_size = comm.get_world_size()
    if total_batch_size < 1 or total_batch_size % world_size:
        raise ValueError(
            f"{needs.key('SOLVER.IMS_PER_BATCH')} is {total_batch_size}: expected a multiple of "
            f"the {world_size} processes, at least one image each."
        )
    if not _is_map_style(dataset):
        raise TypeError(
            f"The data set is a {type(dataset).__name__}: expected a list of records, or what has "
            "a length and items, since the order of any other kind cannot be computed ahead. For a "
            "stream let YourTrainer.build_train_loader return "
            "detectron2.data.build_detection_train_loader(...), which cannot be resumed exactly."
        )
    checked = checked or isinstance(dataset, Records)
    if reads_images(mapper) and isinstance(dataset, Sequence):
        names = ", ".join(map(repr, needs.train)) or "that build_train_loader was given"
        where = f"{needs.key('DATASETS.TRAIN')}: data set {names}"
        if not skip_corrupt:
            check_image_files(where, dataset)
        if not checked:
            check_records_for_mapper(needs, where, dataset)
    groups = aspect_groups(_outline(dataset)) if aspect_ratio_grouping else None
    indices = _stream_of(sampler, len(dataset))
    # A list is held serialised, as by Detectron2; a custom data set as it is.
    if isinstance(dataset, Sequence) and not isinstance(dataset, Records):
        dataset = DatasetFromList(list(dataset), serialize=True)
    return TrainLoader(
        dataset,
        CheckedMapper(mapper, needs.train),
        indices,
        total_batch_size,
        groups=groups,
        num_workers=num_workers,
        collate_fn=collate_fn,
        seed=int(comm.shared_random_seed() if seed is None else seed),
        start_iter=start_iter,
        skip_corrupt=skip_corrupt,
        num_classes=needs.num_classes,
    )


def _is_map_style(dataset: Any) -> bool:
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def _stream_of(sampler: Any, size: int) -> Callable[[int], Iterable[int]]:
    """Return what makes this rank's endless stream of indices from a seed.

    Args:
        sampler: as of :func:`build_train_loader`.
        size: of the data set.

    Raises:
        ValueError: a sampler that cannot be seeded anew.
    """
    if sampler is None:
        return lambda seed: TrainingSampler(size, seed=seed)
    if type(sampler) is RandomSubsetTrainingSampler:
        share = (len(sampler._indexes_subset) + 0.5) / size
        return lambda seed: RandomSubsetTrainingSampler(
            size, share, shuffle=sampler._shuffle, seed_shuffle=seed, seed_subset=seed
        )
    if type(sampler) in (TrainingSampler, RepeatFactorTrainingSampler):
        return lambda seed: _seeded_anew(sampler, seed)
    if callable(sampler):
        return sampler  # type: ignore[no-any-return]
    raise ValueError(
        f"The sampler is a {type(sampler).__name__}: expected one of Detectron2's for "
        "training, or a function from a seed to an endless stream of indices."
    )


def _outline(dataset: Any) -> Any:
    return dataset.outline() if isinstance(dataset, Records) else dataset


def _seeded_anew(sampler: Any, seed: int) -> Any:
    other = copy.copy(sampler)
    other._seed = seed
    return other


class _Samples(Dataset[Record]):
    """Maps a draw (index, position) to the model's input, seeded by the position."""

    def __init__(
        self,
        records: Any,
        mapper: Mapper,
        seed: int,
        skip: bool,
        num_classes: int | None,
    ) -> None:
        self._records, self._mapper, self._seed, self._skip = records, mapper, seed, skip
        self._num_classes = num_classes
        self._rank, self._world_size = comm.get_rank(), comm.get_world_size()

    def __getitem__(self, draw: Draw) -> Record:
        index, position = draw
        position = position * self._world_size + self._rank
        skipped: list[str] = []
        for attempt in range(1 + MAX_REPLACEMENTS):
            seed = sample_seed(self._seed, position, attempt)
            if attempt:
                index = seed % len(self._records)
            with seeded(seed):
                try:
                    record = self._mapper(self._records[index])
                except UnreadableImageError as error:
                    if not self._skip:
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
        if self._num_classes is None or not isinstance(instances, Instances):
            return
        classes = set(instances.gt_classes.tolist()) if instances.has("gt_classes") else set()
        if not classes <= set(range(self._num_classes)):
            raise ValueError(
                f"The mapper gives {record.get('file_name', 'a record')} the gt_classes "
                f"{sorted(classes)}: expected numbers in [0, {self._num_classes}), "
                "the student's class count."
            )


class _Collate:
    """Takes out what was skipped, and makes a batch of the rest."""

    def __init__(self, function: Callable[[list[Any]], Any] | None) -> None:
        self._function = function

    def __call__(self, samples: list[Any]) -> tuple[list[str], Any]:
        # A custom mapper may return something else than a dictionary.
        skipped = [m for s in samples if isinstance(s, dict) for m in s.pop(_SKIPPED, ())]
        return skipped, samples if self._function is None else self._function(samples)
