"""Loaders whose workers outlive a SIGTERM: the run that they serve saves first."""

import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader


def batches(loader: DataLoader) -> Generator[Any, None, None]:
    """Iterate over a loader, whose workers no SIGTERM ends, and which are gone afterwards.

    torchrun, SLURM and shells send the signal to the workers as well; a training that lost one
    cannot finish its step. Close the generator where it is left before its end.
    """
    with _sigterm_blocked():
        # Workers inherit the mask.
        found = iter(loader)
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


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
