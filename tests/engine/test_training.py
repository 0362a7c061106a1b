"""What every training does, whatever it was put as: the three ways are one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.engine.runs import World, assert_same, checkpoint
from tests.engine.ways import WAYS, train


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Six steps each way."""
    folders = {way: tmp_path_factory.mktemp(way) for way in WAYS}
    for way, folder in folders.items():
        train(way, world, folder)
    return folders


def half_of(folder: Path, to: Path) -> Path:
    """What a run that was killed after three steps leaves."""
    left = shutil.ignore_patterns("model_final.pth", "*5.pth", "*.lock")
    shutil.copytree(folder, to, ignore=left)
    (to / "last_checkpoint").write_text("model_0000002.pth")
    return to


@pytest.mark.parametrize("way", WAYS[1:])
def test_training_is_the_same_in_every_way(way: str, whole: dict[str, Path]) -> None:
    yaml, other = checkpoint(whole["YAML"]), checkpoint(whole[way])
    for part in ("model", "distillers"):
        assert_same(yaml[part], other[part], part)
    for part in ("optimizer", "data", "teacher_sha256"):
        assert_same(yaml["trainer"][part], other["trainer"][part], part)


@pytest.mark.parametrize("way", WAYS)
class TestEveryWay:
    def test_resumed_equals_the_whole(self, way, world: World, whole, tmp_path) -> None:
        folder = half_of(whole[way], tmp_path / "resumed")
        train(way, world, folder, "--resume")
        assert_same(
            {k: v for k, v in checkpoint(whole[way]).items() if k != "run"},
            {k: v for k, v in checkpoint(folder).items() if k != "run"},
        )
