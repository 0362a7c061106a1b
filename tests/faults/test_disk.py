"""A full disk: the run stops with its message, the earlier checkpoints are whole."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.engine import inside
from tests.engine.runs import World, assert_same, checkpoint, children

pytestmark = pytest.mark.faults

OPTIONS = ("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "()")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("a small file system can be mounted only by root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_save_full_disk(small_disk: Path, world: World, tmp_path: Path) -> None:
    out = small_disk / "out"
    line = world.arguments(out, *OPTIONS)
    with children(line, folder=tmp_path / "log") as (run,):
        assert run.wait() == 1
        assert "model_0000003.pth could not be written" in run.output
        assert "Earlier files are whole" in run.output and "No space left" in run.output
    assert [p.name for p in out.glob("*.pth*")] == ["model_0000001.pth"]
    assert (out / "last_checkpoint").read_text() == "model_0000001.pth"
    # On a larger disk it goes on as if nothing had been.
    larger, whole = tmp_path / "larger", tmp_path / "whole"
    shutil.copytree(out, larger)
    world.main(larger, "--resume", *OPTIONS)
    world.main(whole, *OPTIONS)
    assert_same(checkpoint(whole), checkpoint(larger))


def test_save_file_size_limit(world: World, tmp_path: Path) -> None:
    """A quota, as a limit of the process: needs no rights."""
    out = tmp_path / "out"
    world.main(
        out, *OPTIONS[:-2], "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()"
    )
    before = checkpoint(out, "model_0000001")
    line = world.arguments(out, "--resume", *OPTIONS)
    prepare = partial(inside.limit_file_size, 1_000_000)
    with children(line, folder=tmp_path / "log", prepare=prepare) as (run,):
        assert run.wait() == 1
        assert "model_0000003.pth could not be written" in run.output
    assert_same(before, checkpoint(out, "model_0000001"))
    assert not list(out.glob("*.tmp")) and not (out / "model_0000003.pth").exists()
