"""The schedule of a training, a value: what ``--epochs`` and ``--batch`` make of a config's.

:func:`rescale` computes it; :class:`YamlSchedule` and :class:`LazySchedule` read and write it.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from omegaconf import DictConfig, ListConfig

#: A warm-up of the learning rate is not shortened below this many iterations, or a quarter of the
#: training. It is mmdetection's default; Detectron2's zoo has 1000 iterations, for 90,000.
LEAST_WARMUP = 500

# Keys of distillers that count iterations: lengths from the start (WARMUP_ITERS, DETACH_ITERS), and
# points of the training (STOP_ITER, STEPS). Arguments in a LazyConfig are named alike.
_LENGTH = re.compile(r".*_iters", re.I)
_POINT = re.compile(r".*_iter|steps", re.I)


@dataclass(frozen=True)
class Schedule:
    """What a training counts in iterations, with the batch and the rate that belong to it.

    Attributes:
        batch: images an iteration, all processes together.
        max_iter: iterations, >= 1.
        lr: base learning rate.
        warmup: iterations of its warm-up. 0: none.
        checkpoint_period, eval_period: iterations. 0: none.
        milestones: iterations after which the learning rate drops; () in a LazyConfig, whose
            scheduler counts in shares of the training.
        distillers: (key, value) of each key of a distiller that counts iterations.
    """

    batch: int
    max_iter: int
    lr: float
    warmup: int = 0
    checkpoint_period: int = 0
    eval_period: int = 0
    milestones: tuple[int, ...] = ()
    distillers: tuple[tuple[str, Any], ...] = ()


def rescale(
    schedule: Schedule,
    *,
    epochs: float | None = None,
    batch: int | None = None,
    images: int | None = None,
    max_iter: int | None = None,
) -> Schedule:
    """The schedule for another length or batch.

    With a batch of B images for the B0 of ``schedule`` the learning rate becomes B / B0 of its.
    E epochs are E x images / B iterations; milestones keep their share of ``max_iter``, and those
    that fall on its end are left out. Without epochs a batch keeps the number of images that are
    seen. Warm-ups and the checkpoint period are shortened with the training, never lengthened:
    a warm-up to no less than :data:`LEAST_WARMUP`, the period to no less than an epoch. An
    evaluation that is not due within the training becomes due after each epoch.

    Args:
        schedule: of the config.
        epochs: > 0, needs ``images``; None: no length is asked for.
        batch: images an iteration, >= 1; None: that of ``schedule``.
        images: number of training images.
        max_iter: a length that was set by hand, which wins.

    Raises:
        ValueError: the epochs are shorter than an iteration.

    Example:
        >>> recipe = Schedule(batch=16, max_iter=90_000, lr=0.02, milestones=(60_000, 80_000))
        >>> rescale(recipe, epochs=12, batch=8, images=3_000)
        Schedule(batch=8, max_iter=4500, lr=0.01, ..., milestones=(3000, 4000), ...)
    """
    batch = batch or schedule.batch
    factor, epoch = batch / schedule.batch, (images or 0) / batch
    asked = round(epochs * epoch) if epochs else max(1, round(schedule.max_iter / factor))
    length = max_iter or asked
    if not length:
        raise ValueError(
            f"--epochs is {epochs:g} and --batch {batch}, which of {images} images is less than "
            "one iteration; expected more epochs or a smaller batch."
        )
    ratio = length / schedule.max_iter
    least = min(LEAST_WARMUP, length // 4)
    period, evaluation = _shortened(schedule.checkpoint_period, ratio), schedule.eval_period
    if epochs:
        period = max(period, math.ceil(epoch)) if period else 0
        evaluation = evaluation if 0 < evaluation <= length else max(1, int(epoch))
    return Schedule(
        batch=batch,
        max_iter=length,
        lr=schedule.lr * factor,
        warmup=_shortened(schedule.warmup, ratio, least),
        checkpoint_period=period,
        eval_period=evaluation,
        milestones=scaled_points(schedule.milestones, ratio, length),
        distillers=tuple(
            (
                key,
                _shortened(value, ratio, least)
                if _LENGTH.fullmatch(key)
                else scaled_points(value, ratio, length),
            )
            for key, value in schedule.distillers
        ),
    )


def _shortened(count: int, ratio: float, least: int = 1) -> int:
    return min(count, max(round(count * ratio), least, 1))


def scaled_points(value: Any, ratio: float, length: int) -> Any:
    """Points that keep their share of the training; several lose those that fall on its end."""
    if isinstance(value, tuple):
        return tuple(sorted(n for n in {round(n * ratio) for n in value} if 0 < n < length))
    return min(length, max(1, round(value * ratio))) if value else 0


class ConfigSchedule:
    """The schedule in a config, of either language: its keys, and how they are read and set."""

    keys: ClassVar[Mapping[str, str]]

    def __init__(self, cfg: Any) -> None:
        """
        Args:
            cfg: is changed in place.
        """
        self.cfg = cfg

    def read(self) -> Schedule:
        """The schedule of the config."""
        found: Any = {name: value_of(self.cfg, key) or 0 for name, key in self.keys.items()}
        counts = (
            (name, tuple(value) if isinstance(value, list | tuple | ListConfig) else value)
            for name, value in ((name, node[key]) for name, node, key in self.counts())
        )
        return Schedule(**found, distillers=tuple(counts))

    def write(self, schedule: Schedule, by_hand: Collection[str] = ()) -> None:
        """Set the keys that the config has, but those that were set by hand."""
        for name, key in self.keys.items():
            if key not in by_hand and value_of(self.cfg, key) is not None:
                section, _, leaf = key.rpartition(".")
                value_of(self.cfg, section)[leaf] = getattr(schedule, name)
        self.write_counts(schedule, by_hand)

    def write_counts(self, schedule: Schedule, by_hand: Collection[str] = ()) -> None:
        """Set the keys of distillers that count iterations."""
        for (name, node, key), (_, value) in zip(self.counts(), schedule.distillers, strict=True):
            if name not in by_hand and name.partition("[")[0] not in by_hand:
                node[key] = list(value) if isinstance(value, tuple) else value

    def counts(self) -> Iterator[tuple[str, Any, Any]]:
        """Each key of a distiller that counts iterations: its name, and where its value is."""
        raise NotImplementedError

    def epochs(self, asked: float | None, by_hand: Collection[str], notes: list[str]) -> Any:
        """The epochs to train for: what is asked for, if the config has none."""
        return asked

    def apply(
        self,
        *,
        epochs: float | None,
        batch: int | None,
        by_hand: Collection[str],
        count_images: Callable[[], int],
        max_iter: int | None = None,
    ) -> list[str]:
        """Set the schedule that ``--epochs`` (``SOLVER.EPOCHS``) and ``--batch`` ask for.

        Args:
            epochs: > 0; None: those of the config, if it has some.
            batch: images a step, >= 1; None: as in the config.
            by_hand: keys of overrides, which stay as they are.
            count_images: called if there are epochs.
            max_iter: of the config without overrides, to which its milestones belong.

        Returns:
            what was set, and which override stands for an argument; [] for nothing.

        Raises:
            ValueError: a value out of its range, a length that two overrides give, or see
                :func:`rescale` and :meth:`read`.
        """
        keys = self.keys
        if epochs is not None and not 0 < epochs < math.inf:
            raise ValueError(f"--epochs is {epochs}; expected a positive number.")
        if batch is not None and batch < 1:
            raise ValueError(f"--batch is {batch}; expected a positive number.")
        notes: list[str] = []
        epochs = self.epochs(epochs, by_hand, notes)
        if batch is not None and keys["batch"] in by_hand:
            own = value_of(self.cfg, keys["batch"])
            notes.append(f"{keys['batch']} {own} is set by hand: not --batch.")
            batch = None
        if epochs is None and batch is None:
            return notes
        schedule, given = self.read(), None
        if batch and not schedule.lr and keys["lr"] not in by_hand:
            raise ValueError(
                f"--batch is {batch}, and the config has no {keys['lr']} to scale with it; "
                f"expected it, or {keys['batch']} and the learning rate set by hand."
            )
        if keys["max_iter"] in by_hand:
            given = schedule.max_iter
            if epochs:
                notes.append(f"{keys['max_iter']} {given} is set by hand: not --epochs {epochs:g}.")
        images = count_images() if epochs else None
        if epochs and max_iter:
            schedule = replace(schedule, max_iter=max_iter)
        scaled = rescale(schedule, epochs=epochs, batch=batch, images=images, max_iter=given)
        self.write(scaled, by_hand)
        values = ((key, value_of(self.cfg, key)) for key in keys.values())
        shown = ", ".join(f"{key} {value}" for key, value in values if value is not None)
        seen = f" for {images} images" if images is not None else ""
        return [*notes, f"Schedule{seen}: {shown}"]


def below(name: str, node: Any) -> Iterator[tuple[str, Any, Any]]:
    """Each key below a node that counts iterations: its name, and where its value is."""
    pairs: Any = node.items() if isinstance(node, dict | DictConfig) else enumerate(node or ())
    for key, value in pairs:
        if isinstance(value, dict | DictConfig):
            yield from below(f"{name}.{key}", value)
        elif is_count(str(key)) and value is not None:
            yield f"{name}.{key}", node, key


def is_count(key: str) -> bool:
    """Whether a key is named as those that count iterations."""
    return bool(_LENGTH.fullmatch(key) or _POINT.fullmatch(key))


def value_of(cfg: Any, key: str) -> Any:
    """The value of a dotted key of a YAML config or LazyConfig; None if there is no such key."""
    for part in key.split("."):
        cfg = cfg.get(part) if isinstance(cfg, dict | DictConfig) else None
    return cfg
