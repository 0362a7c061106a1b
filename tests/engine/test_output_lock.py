"""The lock of the output folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ssim_kd.engine import output_lock as module
from ssim_kd.engine.output_lock import output_lock
from tests.engine.runs import World


def test_output_lock_held(tmp_path: Path) -> None:
    with output_lock(str(tmp_path)):
        expected = rf"OUTPUT_DIR .*{tmp_path.name}.* \(process {os.getpid()} on "
        with pytest.raises(RuntimeError, match=expected), output_lock(str(tmp_path)):
            pass
    with output_lock(str(tmp_path)):
        pass


def test_output_lock_without_locks(tmp_path: Path, monkeypatch, caplog) -> None:
    def lack(number: int) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(module, "lock", refuse)

    for number in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
        caplog.clear()
        lack(number)
        with output_lock(str(tmp_path)):
            assert f"{tmp_path}/.lock: locks are not available" in caplog.text
    lack(errno.EIO)
    with pytest.raises(OSError, match="Input/output"), output_lock(str(tmp_path)):
        pass


def test_main_refuses_a_locked_output_dir_before_it_writes(world: World, tmp_path: Path) -> None:
    with output_lock(str(tmp_path)), pytest.raises(RuntimeError, match="OUTPUT_DIR"):
        world.main(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
