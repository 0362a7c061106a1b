"""The order in which a training run sees its images, computed from indices alone.

As in Detectron2, each rank takes every ``world_size``-th index of one endless shuffled stream, and
collects them in two buckets, wide and tall images; a full bucket is a batch. Working on indices
makes it cheap to skip the batches that an interrupted run has seen: 1.4 million in about a second.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

# An image to load: its index in the data set, and its position in this rank's stream.
Draw = tuple[int, int]


class BatchOrder:
    """Yields the batches of one rank, from a given iteration on, for ever.

    Args:
        indices: the endless stream of indices of this rank; iterating it must start anew.
        batch_size: images of this rank in a batch, >= 1.
        groups: (K,) group of each image, for example 0 wide and 1 tall; a batch is of one group.
            None puts all in one.
        start_iter: number of batches to skip, >= 0.
    """

    def __init__(
        self,
        indices: Iterable[int],
        batch_size: int,
        *,
        groups: NDArray[np.int64] | None,
        start_iter: int = 0,
    ) -> None:
        self._indices = indices
        self._batch_size = batch_size
        self._groups = groups
        self._start_iter = start_iter

    def __iter__(self) -> Iterator[list[Draw]]:
        # Lists: reading single elements of a NumPy array is slow.
        groups = None if self._groups is None else self._groups.tolist()
        buckets: dict[int, list[Draw]] = {}
        number = 0
        for position, index in enumerate(self._indices):
            bucket = buckets.setdefault(0 if groups is None else groups[index], [])
            bucket.append((index, position))
            if len(bucket) == self._batch_size:
                batch = bucket[:]
                bucket.clear()
                number += 1
                if number > self._start_iter:
                    yield batch


def index_stream(cfg: CfgNode, dicts: Sequence[dict[str, Any]]) -> Callable[[int], Iterable[int]]:
    """Return what makes this rank's endless stream of indices from a seed.

    Args:
        cfg: ``DATALOADER.SAMPLER_TRAIN`` and the keys of that sampler are read.
        dicts: the records of the data set; not kept.

    Raises:
        ValueError: the sampler is not one of those that can be resumed exactly.
    """
    loader, size = cfg.DATALOADER, len(dicts)
    if loader.SAMPLER_TRAIN == "TrainingSampler":
        return lambda seed: TrainingSampler(size, seed=seed)
    if loader.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        # Detectron2 0.6 has no REPEAT_SQRT: it always takes the root.
        options = {"sqrt": loader.REPEAT_SQRT} if "REPEAT_SQRT" in loader else {}
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            [dicts[i] for i in range(size)], loader.REPEAT_THRESHOLD, **options
        )
        return lambda seed: RepeatFactorTrainingSampler(factors, seed=seed)
    # Detectron2 0.6 has this sampler, but no key for how much it takes.
    has_subset = "RANDOM_SUBSET_RATIO" in loader
    if loader.SAMPLER_TRAIN == "RandomSubsetTrainingSampler" and has_subset:
        ratio = loader.RANDOM_SUBSET_RATIO
        return lambda seed: RandomSubsetTrainingSampler(
            size, ratio, seed_shuffle=seed, seed_subset=seed
        )
    names = ["TrainingSampler", "RepeatFactorTrainingSampler"]
    names += ["RandomSubsetTrainingSampler"] if has_subset else []
    raise ValueError(
        f"DATALOADER.SAMPLER_TRAIN is {loader.SAMPLER_TRAIN!r}: expected one of {', '.join(names)}."
    )


def aspect_groups(dicts: Sequence[dict[str, Any]]) -> NDArray[np.int64] | None:
    """Return (K,) int64: 0 for images wider than tall, else 1, as Detectron2 groups them.

    None, with a warning, if the size of an image is not known before it is read.
    """
    records = (dicts[i] for i in range(len(dicts)))
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
