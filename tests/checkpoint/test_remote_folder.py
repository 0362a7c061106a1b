"""The folder of a run behind a path handler: as a local one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from tests.checkpoint.test_checkpointer import make, names, resume, save, truncate


class Store(PathHandler):
    """store://x is {root}/x, with the functions that iopath's own S3PathHandler has."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def _at(self, path: str) -> Path:
        return self._root / path.removeprefix("store://")

    def _get_supported_prefixes(self) -> list[str]:
        return ["store://"]

    def _get_local_path(self, path: str, force: bool = False, **_: Any) -> str:
        # As a cache: it changes if force is set.
        copy = self._root.parent / "cache" / self._at(path).name
        copy.parent.mkdir(exist_ok=True)
        if force or not copy.exists():
            shutil.copy(self._at(path), copy)
        return str(copy)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: Any) -> Any:
        assert "a" not in mode and "+" not in mode
        return open(self._at(path), mode, buffering=buffering)

    def _exists(self, path: str, **_: Any) -> bool:
        return self._at(path).exists()

    def _isfile(self, path: str, **_: Any) -> bool:
        return self._at(path).is_file()

    def _isdir(self, path: str, **_: Any) -> bool:
        return self._at(path).is_dir()

    def _ls(self, path: str, **_: Any) -> list[str]:
        return os.listdir(self._at(path))

    def _rm(self, path: str, **_: Any) -> None:
        self._at(path).unlink()


@pytest.fixture
def folder(tmp_path) -> Iterator[Path]:
    handler = Store(tmp_path / "store")
    (tmp_path / "store/out").mkdir(parents=True)
    PathManager.register_handler(handler)
    yield tmp_path / "store/out"
    del PathManager._path_handlers["store://"]


OUT: Any = "store://out"


def test_resume_or_load(folder, caplog) -> None:
    save(OUT, 1, 2, 3, keep=2)
    assert names(folder) == ["model_0000002.pth", "model_0000003.pth"]
    assert resume(OUT) == 3
    truncate(folder)
    assert resume(OUT) == 2
    assert "Checkpoint skipped" in caplog.text
    save(OUT, 3, resumed=True)
    assert resume(OUT) == 3
    make(OUT)[0].keep_best()
    assert "model_best.pth" in names(folder)


def test_resume_or_load_anew_beside_an_earlier_run(folder, caplog) -> None:
    save(OUT, 1, 5)
    checkpointer, _ = make(OUT, keep=1)
    assert not checkpointer.resume_or_load("", resume=False)
    assert "store://out holds 2 checkpoints" in caplog.text
    assert make(OUT)[0].newest() is None


def test_save_fails(folder, monkeypatch) -> None:
    save(OUT, 1)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "_open", full)
    with pytest.raises(
        OSError, match=r"store://out/model_0000002\.pth could not be written.*space"
    ):
        save(OUT, 2)
