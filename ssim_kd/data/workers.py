"""Loaders whose workers outlive SIGTERM and Ctrl-C: the run that they serve saves first."""

import signal
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from torch.utils.data import DataLoader

from .mapper import CheckedMapper, Mapper, check_image_files, reads_images
from .training_sets import test_records


def batches(loader: DataLoader) -> Generator[Any, None, None]:
    """Iterate over a loader; its workers survive SIGTERM and Ctrl-C, and are gone afterwards.

    torchrun, SLURM and shells send the signals to the workers as well; a training that lost one
    cannot finish its step. Close the generator if it is left before its end.
    """
    # Workers inherit the mask.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        found = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield from found
    finally:
        # An error keeps the iterator alive by its traceback; without this the workers would
        # stay until that is garbage, and then be waited for.
        shut_down = getattr(found, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
        for worker in getattr(found, "_workers", ()):
            if worker.is_alive():
                # One that hangs: torch has sent it a SIGTERM, Python would wait for it at exit.
                worker.kill()
                worker.join()


class EvaluationLoader:
    """A loader of finite length, iterated over by :func:`batches`."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return batches(self.loader)


def build_evaluation_loader(
    cfg: CfgNode, name: str, mapper: Mapper | None = None
) -> EvaluationLoader:
    """Build Detectron2's test loader of a set, with errors that name set and image.

    Args:
        cfg: DATASETS, DATALOADER and INPUT are read.
        name: of a registered set.
        mapper: as of :func:`build_train_loader`.

    Raises:
        ValueError: the set cannot be loaded.
        OSError: an image file is missing, or the first unusable.
    """
    where = f"DATASETS.TEST: data set {name!r}"
    proposals = None
    if cfg.MODEL.LOAD_PROPOSALS:
        proposals = [cfg.DATASETS.PROPOSAL_FILES_TEST[list(cfg.DATASETS.TEST).index(name)]]
    records = test_records(where, name, proposals)
    if reads_images(mapper) and isinstance(records, Sequence):
        check_image_files(where, records)
    checked = CheckedMapper(mapper or DatasetMapper(cfg, False), [name])
    loader = build_detection_test_loader(
        records, mapper=checked, num_workers=cfg.DATALOADER.NUM_WORKERS
    )
    return EvaluationLoader(loader)
