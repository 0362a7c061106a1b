"""Workers of a loader: no SIGTERM ends them, the loader's end does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
from torch.utils.data import DataLoader, Dataset

from ssim_kd.data.workers import EvaluationLoader, batches


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


def test_sigterm_ends_no_worker() -> None:
    found = iter(EvaluationLoader(loader()))
    pids = {next(found), next(found)}
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    assert len(list(found)) == len(EvaluationLoader(loader())) - 2
    assert not multiprocessing.active_children()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_closing_ends_the_workers_at_once() -> None:
    found = batches(loader())
    next(found)
    assert len(multiprocessing.active_children()) == 2
    start = time.monotonic()
    found.close()
    assert not multiprocessing.active_children()
    assert time.monotonic() - start < 3, "torch terminates after 5 s"


@pytest.mark.faults
def test_a_worker_that_hangs_is_killed() -> None:
    found = batches(loader(slow=2))
    next(found)
    time.sleep(0.5)
    found.close()
    assert not multiprocessing.active_children()


def test_without_workers() -> None:
    assert set(batches(loader(workers=0))) == {os.getpid()}
