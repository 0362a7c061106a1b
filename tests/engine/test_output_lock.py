"""The lock of the output folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ssim_kd.engine import output_lock as module
from ssim_kd.engine.output_lock import make_output_dir, output_lock
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


@pytest.mark.parametrize(
    "name", [".lock", "config.yaml", "student.yaml", "log.txt", "metrics.json", "inference"]
)
def test_make_output_dir_removes_links(name: str, tmp_path: Path, caplog) -> None:
    """Of a folder that was received: the run would write to the files that they lead to."""
    victim, folder = tmp_path / "victim", tmp_path / "out"
    folder.mkdir()
    victim.write_text("mine")
    (folder / name).symlink_to(victim)
    (folder / "data").symlink_to(tmp_path)  # the user's
    make_output_dir(str(folder))
    assert not (folder / name).is_symlink() and (folder / "data").is_symlink()
    assert f"{folder / name} to {victim}" in caplog.text
    with output_lock(str(folder)):
        assert victim.read_text() == "mine"


@pytest.mark.parametrize("name", ["", "config.yaml", "teacher.py", "model_0000001.pth"])
@pytest.mark.parametrize("link", [False, True])
def test_make_output_dir_of_the_teacher(link: bool, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "out").symlink_to(folder)
    teacher = folder / name
    if name:
        teacher.touch()
    with pytest.raises(ValueError, match=rf"train\.output_dir is .*teacher.*{teacher}"):
        make_output_dir(
            str(folder / "out" if link else folder),
            teacher=["", str(teacher)],
            key="train.output_dir",
        )
    make_output_dir(str(tmp_path / "other"), teacher=[str(teacher), "no such.yaml"])


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_make_output_dir_cannot(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=rf"OUTPUT_DIR is .*{folder}"):
        make_output_dir(str(tmp_path / folder))
