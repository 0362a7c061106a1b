"""The order in which a training run sees its images, computed from indices.

As in Detectron2, each rank takes every ``world_size``-th index of one endless shuffled stream, and
collects them in two buckets, wide and tall images; a full bucket is a batch. Working on indices
makes it cheap to skip the batches that an interrupted run has seen: 1.4 million in about a second.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from numpy.typing import NDArray

from .records import Records

logger = logging.getLogger(__name__)

# An image to load: its index in the data set, and its position in this rank's stream.
Draw = tuple[int, int]


def batch_order(
    indices: Iterable[int],
    batch_size: int,
    *,
    groups: NDArray[np.int64] | None,
    start_iter: int = 0,
) -> Iterator[list[Draw]]:
    """Yield the batches of one rank without end, beginning at an iteration.

    Args:
        indices: the endless stream of indices of this rank.
        batch_size: images of this rank in a batch, >= 1.
        groups: (K,) group of each image, for example 0 wide and 1 tall; a batch is of one group.
            None puts all in one.
        start_iter: number of batches to skip, >= 0.
    """
    # Lists: reading single elements of a NumPy array is slow.
    group_of = None if groups is None else groups.tolist()
    buckets: dict[int, list[Draw]] = {}
    number = 0
    for position, index in enumerate(indices):
        bucket = buckets.setdefault(0 if group_of is None else group_of[index], [])
        bucket.append((index, position))
        if len(bucket) == batch_size:
            batch = bucket[:]
            bucket.clear()
            number += 1
            if number > start_iter:
                yield batch


def stream_of(sampler: Any, size: int) -> Callable[[int], Iterable[int]]:
    """Return what makes this rank's endless stream of indices from a seed.

    Args:
        sampler: one of Detectron2's for training, of which all but the seed is taken, or such a
            function. None: ``TrainingSampler``.
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


def _seeded_anew(sampler: Any, seed: int) -> Any:
    other = copy.copy(sampler)
    other._seed = seed
    return other


def aspect_groups(dataset: Any) -> NDArray[np.int64] | None:
    """Return (K,) int64: 0 for images wider than tall, else 1, as Detectron2 groups them.

    None, with a warning, if the size of an image is not known before it is read.
    """
    if isinstance(dataset, Records):
        return (dataset.rows["width"] <= dataset.rows["height"]).astype(np.int64)
    records = (dataset[i] for i in range(len(dataset)))
    try:
        return np.array([int(d["width"] <= d["height"]) for d in records], dtype=np.int64)
    except (KeyError, TypeError, IndexError):
        logger.warning(
            "Records of the data set have no width or height: images are not grouped by their "
            "aspect, as DATALOADER.ASPECT_RATIO_GROUPING asks for."
        )
        return None


def sample_seed(seed: int, position: int, attempt: int = 0) -> int:
    """Return a seed in [0, 2**32) for one image of the run.

    Args:
        seed: of the run, >= 0.
        position: in the stream of all ranks together, >= 0.
        attempt: > 0 for the images that replace one that cannot be read.
    """
    return int(np.random.SeedSequence((seed, position, attempt)).generate_state(1)[0])
