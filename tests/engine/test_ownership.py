"""The lock of a folder."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssim_kd.engine.ownership import sole_owner
from tests.engine.runs import World

OTHER = """
import sys
from ssim_kd.engine.ownership import sole_owner
with sole_owner(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def other(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", OTHER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_one_run_a_folder_of_this_process(tmp_path: Path) -> None:
    with sole_owner(str(tmp_path)):
        expected = rf"in use by another run \(process {os.getpid()} "
        alias = tmp_path / ".." / tmp_path.name
        with pytest.raises(RuntimeError, match=expected), sole_owner(str(alias)):
            pass
        # The refused one has taken neither the owner's lock away nor its mark.
        _, error = other(tmp_path).communicate(timeout=60)
        assert f"in use by another run (process {os.getpid()} on" in error
    with sole_owner(str(tmp_path)):
        pass


def test_the_lock_ends_with_its_process_whatever_that_has_forked(tmp_path: Path) -> None:
    """Workers of a loader outlive a run that is killed by some seconds."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def run() -> None:
        with sole_owner(str(tmp_path)):
            context.Process(target=time.sleep, args=(3,)).start()
            ready.set()
            time.sleep(60)

    first = context.Process(target=run)
    first.start()
    assert ready.wait(20)
    first.kill()
    first.join()
    with sole_owner(str(tmp_path)):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch, caplog) -> None:
    def lack(number: int) -> None:
        def refuse(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "lockf", refuse)

    for number in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
        caplog.clear()
        lack(number)
        with sole_owner(str(tmp_path)):
            assert "cannot be locked" in caplog.text
    lack(errno.EIO)
    with pytest.raises(OSError, match="Input/output"), sole_owner(str(tmp_path)):
        pass


def test_a_second_run_is_refused_before_it_writes(world: World, tmp_path: Path) -> None:
    with sole_owner(str(tmp_path)), pytest.raises(RuntimeError, match="folder of its own"):
        world.main(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
