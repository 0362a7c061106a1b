"""The lock of a file, within this process and between processes."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ssim_kd.locks import LockHeldError, lock

OTHER = """
import sys
from ssim_kd.locks import lock
with lock(sys.argv[1], wait=False):
    print("held")
"""


def other(path: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", OTHER, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_lock_held(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with lock(path, wait=False):
        alias = tmp_path / ".." / tmp_path.name / ".lock"
        with (
            pytest.raises(LockHeldError, match=f"process {os.getpid()} on "),
            lock(alias, wait=False),
        ):
            pass
        # The one that was refused has changed neither the lock nor its text.
        assert f"LockHeldError: process {os.getpid()} on " in other(path).stderr
    assert other(path).stdout == "held\n"


def test_lock_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    order: list[str] = []

    def second() -> None:
        with lock(tmp_path / ".lock", wait=True):
            order.append("second")

    with lock(tmp_path / ".lock", wait=True):
        thread = threading.Thread(target=second)
        thread.start()
        while "Waiting for process" not in caplog.text:
            time.sleep(0.01)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]


def test_lock_of_a_killed_process_with_a_forked_child(tmp_path: Path) -> None:
    """Workers of a loader outlive a run that is killed by some seconds."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def run() -> None:
        with lock(tmp_path / ".lock", wait=False):
            context.Process(target=time.sleep, args=(3,)).start()
            ready.set()
            time.sleep(60)

    first = context.Process(target=run)
    first.start()
    assert ready.wait(20)
    with pytest.raises(LockHeldError), lock(tmp_path / ".lock", wait=False):
        pass
    first.kill()
    first.join()
    with lock(tmp_path / ".lock", wait=False):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EIO])
def test_lock_not_available(number: int, tmp_path: Path, monkeypatch) -> None:
    import portalocker.portalocker as implementation

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(implementation, "LOCKER", refuse)
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError) as raised, lock(tmp_path / ".lock", wait=True):
        pass
    assert raised.value.errno == number


def test_lock_does_not_follow_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"), lock(tmp_path / ".lock", wait=False):
        pass
    assert victim.read_text() == "mine"
