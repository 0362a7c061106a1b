"""Experiment trackers, MLflow and Weights & Biases, as writers next to TensorBoard's.

``TRACKING.WRITERS ("mlflow",)`` adds them to the trainer. In a custom trainer they stand
first, since TensorBoard's writer clears the pictures::

    class Trainer(DefaultTrainer):
        def build_writers(self):
            return [MLflowWriter(self.cfg), *super().build_writers()]
"""

from detectron2.config import CfgNode

from .mlflow import MLflowWriter
from .wandb import WandbWriter
from .writer import TRACKED_RUNS, Accessory, TrackerWriter, check_package

#: Writers by their name in ``TRACKING.WRITERS``.
TRACKERS: dict[str, type[TrackerWriter]] = {w.name: w for w in (MLflowWriter, WandbWriter)}


def build_trackers(cfg: CfgNode) -> list[TrackerWriter]:
    """The writers of ``TRACKING.WRITERS``.

    Raises:
        ValueError: as :func:`check_trackers`.
    """
    check_trackers(cfg)
    return [TRACKERS[name](cfg) for name in cfg.TRACKING.WRITERS]


def check_trackers(cfg: CfgNode) -> None:
    """Check that the trackers of a config are known and installed.

    Raises:
        ValueError: naming the key, its value and what is expected.
    """
    for name in cfg.TRACKING.WRITERS:
        if name not in TRACKERS:
            raise ValueError(
                f"TRACKING.WRITERS is {cfg.TRACKING.WRITERS!r}; expected names of "
                f"{sorted(TRACKERS)}, e.g. ('mlflow',)."
            )
        check_package(name)


__all__ = [
    "TRACKED_RUNS",
    "TRACKERS",
    "Accessory",
    "MLflowWriter",
    "TrackerWriter",
    "WandbWriter",
    "build_trackers",
    "check_trackers",
]
