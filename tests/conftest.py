"""What every test shares: few threads, fixed seeds, no network, outputs in temporary folders."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Small tensors gain nothing from threads, and threads that wait cost much if cores are shared.
# Set before torch is imported, and inherited by the processes that tests start.
THREADS = int(os.environ.get("SSIM_KD_TEST_THREADS", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

SEED = 20240211
LOOPBACK = ("127.", "::1", "localhost")

torch.set_num_threads(THREADS)
# A shell's background ignores Ctrl-C, and so would what tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Start every test from the same random state, whichever tests ran before."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True, scope="session")
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep Detectron2's cache and data folders, and thereby the user's files, out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FVCORE_CACHE", str(tmp_path_factory.mktemp("fvcore_cache")))
        patch.setenv("DETECTRON2_DATASETS", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Refuse connections that leave this machine: no test may depend on a download."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        leaves = self.family in (socket.AF_INET, socket.AF_INET6)
        if leaves and not str(address[0]).startswith(LOOPBACK):
            raise OSError(f"tests use no network, but one tried to connect to {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    """An empty folder to set OUTPUT_DIR to."""
    folder = tmp_path / "output"
    folder.mkdir()
    return folder
