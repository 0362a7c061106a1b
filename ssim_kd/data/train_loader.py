"""A training loader that can be resumed exactly: ``build_train_loader(cfg, start_iter=...)``."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog, DatasetFromList, DatasetMapper
from detectron2.data.build import _train_loader_from_config
from detectron2.utils import comm

from .coco import reads_json_file
from .mapper import CheckedMapper, Mapper, check_image_files, reads_images, seeded
from .needs import Needs
from .records import Record, Records
from .resumable_loader import TrainLoader
from .samplers import aspect_groups, stream_of
from .training_sets import records_needed
from .validation import check_records_for_mapper


def _from_config(
    cfg: CfgNode,
    *,
    mapper: Mapper | None = None,
    dataset: Sequence[Record] | None = None,
    sampler: Any = None,
    seed: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    needs = Needs.from_config(cfg)
    # check_datasets has seen what json files hold.
    seen = all(n in DatasetCatalog and reads_json_file(n) for n in needs.train)
    checked = dataset is None and seen
    if dataset is None:
        dataset = records_needed(needs)
    _check_map_style(dataset)
    mapper = mapper or DatasetMapper(cfg, True)
    try:
        with seeded(0):  # a sampler draws a seed that is not taken
            values = _train_loader_from_config(cfg, mapper, dataset=dataset, sampler=sampler)
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN is {cfg.DATALOADER.SAMPLER_TRAIN!r}, which cannot be made "
            f"({error}): expected TrainingSampler, RepeatFactorTrainingSampler or, in a Detectron2 "
            "with DATALOADER.RANDOM_SUBSET_RATIO, RandomSubsetTrainingSampler."
        ) from error
    return {
        **values,
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
    _check_map_style(dataset)
    checked = checked or isinstance(dataset, Records)
    if reads_images(mapper) and isinstance(dataset, Sequence):
        names = ", ".join(map(repr, needs.train)) or "that build_train_loader was given"
        where = f"{needs.key('DATASETS.TRAIN')}: data set {names}"
        if not skip_corrupt:
            check_image_files(where, dataset)
        if not checked:
            check_records_for_mapper(needs, where, dataset)
    groups = aspect_groups(dataset) if aspect_ratio_grouping else None
    indices = stream_of(sampler, len(dataset))
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
        seed=drawn_seed() if seed is None else int(seed),
        start_iter=start_iter,
        skip_corrupt=skip_corrupt,
        num_classes=needs.num_classes,
    )


def drawn_seed() -> int:
    """The seed that the random numbers of the main process began with, on every process.

    Given as ``SEED``, it makes the same run again. Without any, a number is drawn.
    """
    seed = torch.initial_seed()
    # torch begins with a larger one.
    return int(comm.all_gather(seed if seed < 2**32 else np.random.randint(2**31))[0])


def _check_map_style(dataset: Any) -> None:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"The data set is a {type(dataset).__name__}: expected a list of records, or what has "
            "a length and items, since the order of any other kind cannot be computed ahead. For a "
            "stream let YourTrainer.build_train_loader return "
            "detectron2.data.build_detection_train_loader(...), which cannot be resumed exactly."
        )
