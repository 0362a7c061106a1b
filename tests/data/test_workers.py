"""Workers of a loader: no SIGTERM ends them, the loader's end does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
from torch.utils.data import DataLoader, Dataset

from ssim_kd.data.workers import EvaluationLoader, batches, build_evaluation_loader
from tests.data.coco_sets import content


class Numbers(Dataset[int]):
    """The process of each item; one may take long."""

    def __init__(self, slow: int | None = None) -> None:
        self.slow = slow

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        if index == self.slow:
            time.sleep(60)
        return os.getpid()


def loader(workers: int = 2, slow: int | None = None) -> DataLoader:
    return DataLoader(Numbers(slow), batch_size=None, num_workers=workers)


def test_evaluation_loader_sigterm_ends_no_worker() -> None:
    found = iter(EvaluationLoader(loader()))
    pids = {next(found), next(found)}
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    assert len(list(found)) == len(EvaluationLoader(loader())) - 2
    assert not multiprocessing.active_children()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_batches_closed() -> None:
    found = batches(loader())
    next(found)
    assert len(multiprocessing.active_children()) == 2
    found.close()
    assert not multiprocessing.active_children()


@pytest.mark.faults
def test_batches_worker_hangs() -> None:
    found = batches(loader(slow=2))
    next(found)
    time.sleep(0.5)
    found.close()
    assert not multiprocessing.active_children()


def test_batches_without_workers() -> None:
    assert set(batches(loader(workers=0))) == {os.getpid()}


def test_build_evaluation_loader(use):
    cfg = use(content())
    batches_ = list(build_evaluation_loader(cfg, "my_set"))
    assert [r["image_id"] for batch in batches_ for r in batch] == [1, 2, 3]
    seen = [b[0] for b in build_evaluation_loader(cfg, "my_set", mapper=lambda r: r["file_name"])]
    assert [name.rsplit("/", 1)[1] for name in seen] == ["0.png", "1.png", "2.png"]


def test_build_evaluation_loader_second_image_missing(use, tmp_path):
    cfg = use(content())
    (tmp_path / "set" / "images" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"DATASETS\.TEST: data set 'my_set': 1 of 3 "):
        build_evaluation_loader(cfg, "my_set")
    assert len(build_evaluation_loader(cfg, "my_set", mapper=dict)) == 3
