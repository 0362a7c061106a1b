"""The folder of a run by a path handler: as a local one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_checkpointer import make, names, resume, save, truncate
from tests.faults.store import Store, store


@pytest.fixture
def folder(tmp_path) -> Iterator[Path]:
    with store(tmp_path) as root:
        (root / "out").mkdir()
        yield root / "out"


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


def test_resume_or_load_anew_next_to_an_earlier_run(folder, caplog) -> None:
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
