"""A training loader that can be resumed exactly: ``build_train_loader(cfg, start_iter=...)``."""

import logging
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList, DatasetMapper
from detectron2.structures import Instances
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from .coco import drop_zero_area_boxes, load_records, reads_json_file
from .mapper import (
    CheckedMapper,
    Mapper,
    Record,
    UnreadableImageError,
    check_image_files,
    reads_images,
    seeded,
)
from .samplers import BatchOrder, Draw, aspect_groups, index_stream, sample_seed
from .validation import check_records_for_mapper, num_classes
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
        self, cfg: CfgNode, dicts: Sequence[Record], mapper: Mapper, seed: int, start_iter: int
    ) -> None:
        world_size = comm.get_world_size()
        total = cfg.SOLVER.IMS_PER_BATCH
        if total < 1 or total % world_size:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH is {total}: expected a multiple of the {world_size} "
                "processes, at least one image each."
            )
        self.seed = seed
        self.start_iter = start_iter
        self.skipped: Counter[str] = Counter()
        self._batch_size = total // world_size
        self._num_workers = cfg.DATALOADER.NUM_WORKERS
        self._groups = aspect_groups(dicts) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None
        self._shape = {"images": len(dicts), "batch": total, "processes": world_size}
        self._mapper = mapper
        self._skip = bool(cfg.DATALOADER.SKIP_CORRUPT)
        self._num_classes = num_classes(cfg)
        self._indices = index_stream(cfg, dicts)
        # A list is held serialised, as by Detectron2; a data set of one's own as it is.
        self._records: Any = (
            DatasetFromList(list(dicts), serialize=True) if isinstance(dicts, Sequence) else dicts
        )
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
            collate_fn=_as_list,
            generator=torch.Generator().manual_seed(self.seed),
        )
        with closing(batches(loader)) as found:
            for batch in found:
                for record in batch:
                    # A mapper of one's own may return something else than a dictionary.
                    for message in record.pop(_SKIPPED, ()) if isinstance(record, dict) else ():
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


def build_train_loader(
    cfg: CfgNode,
    *,
    start_iter: int = 0,
    seed: int | None = None,
    mapper: Mapper | None = None,
    dataset: Sequence[Record] | None = None,
) -> TrainLoader:
    """Build the training loader of this rank. Every rank must call it.

    Args:
        cfg: DATASETS, DATALOADER, INPUT, SOLVER.IMS_PER_BATCH and SEED are read.
        start_iter: number of the first batch, >= 0: batches before it are skipped unread.
        seed: of order and augmentation, >= 0. None takes ``cfg.SEED``, or where that is negative a
            random one that all ranks share.
        mapper: from a record of the data set to the model's input, as Detectron2's is; it may read
            any kind of file, and returns None to ask for another record. None: Detectron2's own,
            for which files and annotations are checked here.
        dataset: the records: a list, or what has a length and items. None loads
            ``cfg.DATASETS.TRAIN``.

    Raises:
        ValueError: an unknown sampler, a batch size that the ranks cannot share, or records that
            cannot be read or mapped.
        OSError: an image file is missing, or the first unusable, unless DATALOADER.SKIP_CORRUPT.
        TypeError: the data set has no length, or no items.
    """
    names = cfg.DATASETS.TRAIN
    where = f"DATASETS.TRAIN: data set {', '.join(map(repr, names))}"
    # check_datasets has seen what json files hold.
    seen = dataset is None and all(n in DatasetCatalog and reads_json_file(n) for n in names)
    if dataset is None:
        dataset = _load_records(cfg, where)
    else:
        where = "The data set that build_train_loader was given"
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"The data set is a {type(dataset).__name__}: expected a list of records, or what has "
            "a length and items, since the order of any other kind cannot be computed ahead. For a "
            "stream let YourTrainer.build_train_loader return "
            "detectron2.data.build_detection_train_loader(...), which cannot be resumed exactly."
        )
    if reads_images(mapper) and isinstance(dataset, Sequence):
        if not cfg.DATALOADER.SKIP_CORRUPT:
            check_image_files(where, dataset)
        if not seen:
            check_records_for_mapper(cfg, where, dataset)
    if seed is None:
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    checked = CheckedMapper(mapper or DatasetMapper(cfg, True), names)
    return TrainLoader(cfg, dataset, checked, int(seed), start_iter)


def _load_records(cfg: CfgNode, where: str) -> Sequence[Record]:
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    records: Sequence[Record] = load_records(
        where,
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=keypoints,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    if cfg.DATASETS.ZERO_AREA_BOXES == "drop" and isinstance(records, Sequence):
        return drop_zero_area_boxes(records, drop_emptied=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    return records


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


def _as_list(batch: list[Record]) -> list[Record]:
    return batch
