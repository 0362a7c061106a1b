"""Each training of a process has its own log; other trainers log what ssim_kd says."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.utils.logger import setup_logger

from ssim_kd.logs import end_logs, share_log
from tests.engine.runs import World, log


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def fresh() -> Iterator[None]:
    end_logs()
    yield
    end_logs()


def test_main_twice_in_a_process_has_two_logs(world: World, tmp_path: Path) -> None:
    short = ("SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()", "DATASETS.TEST", "()")
    world.main(tmp_path / "one", *short)
    first = log(tmp_path / "one")
    world.main(tmp_path / "two", *short)
    assert log(tmp_path / "one") == first
    assert first.count("Starting training") == log(tmp_path / "two").count("Starting training") == 1


def test_share_log_of_detectron2(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ssim_kd"), "handlers", [])  # pytest has its own there
    setup_logger(str(tmp_path))
    share_log()
    share_log()
    logging.getLogger("ssim_kd.modeling").info("the teacher's SHA-256")
    assert log(tmp_path).count("the teacher's SHA-256") == 1
    end_logs()
    logging.getLogger("ssim_kd.modeling").warning("of the next")
    assert "of the next" not in log(tmp_path)


def test_share_log_leaves_handlers_of_the_user(fresh: None, tmp_path: Path) -> None:
    setup_logger(str(tmp_path))
    ours, mine = logging.getLogger("ssim_kd"), logging.NullHandler()
    ours.addHandler(mine)
    try:
        share_log()
        end_logs()
        assert mine in ours.handlers
        assert not [h for h in ours.handlers if type(h) is logging.StreamHandler]
    finally:
        ours.removeHandler(mine)
