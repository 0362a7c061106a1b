"""Files are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from detectron2.utils.file_io import PathManager

from ssim_kd import writing
from ssim_kd.writing import folder_of, write_atomically, write_together


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("unexpected pos 1 vs 2")])
@pytest.mark.parametrize("written", [b"", b"half"])
def test_write_atomically_fails(error, written, tmp_path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file: Any) -> None:
        file.write(written)
        file.flush()
        raise error

    with pytest.raises(OSError, match=rf"{path} could not be written \(\d+ bytes are free"):
        write_atomically(str(path), fail)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_folder_of() -> None:
    """Of a file at the root of a remote store too: "store:/x" is a local path."""
    for folder in ("store://", "store://bucket/run/", "runs", ""):
        file = os.path.join(folder, "x.pth")
        assert os.path.join(folder_of(file), "y") == os.path.join(folder, "y")


@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "detectron2"])
def test_downloads_stay_in_their_folder(scheme, monkeypatch) -> None:
    """Whichever file names the URL; what a server sends would lie at any place."""
    monkeypatch.setattr("iopath.common.file_io.download", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(ValueError, match=r"'\.\.'"):
        PathManager.get_local_path(f"{scheme}://host.org/../../site-packages/x.pth?a=1")


def test_write_atomically_syncs_before_it_renames(tmp_path, monkeypatch) -> None:
    steps = []
    monkeypatch.setattr(writing.os, "fsync", lambda _: steps.append("sync"))
    rename = os.replace
    monkeypatch.setattr(writing.os, "replace", lambda *a: (steps.append("rename"), rename(*a)))
    write_atomically(str(tmp_path / "file"), lambda file: file.write(b"x"))
    assert steps == ["sync", "rename", "sync"]


def test_write_atomically_replaces_links(tmp_path) -> None:
    """Of a folder that was received, at the place and at the temporary one."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("file", "file.tmp"):
        (tmp_path / name).symlink_to(victim)
    write_atomically(str(tmp_path / "file"), lambda file: file.write(b"x"))
    assert victim.read_text() == "mine" and not (tmp_path / "file").is_symlink()


NAMES = ("weights", "other", "record")


def earlier(folder: Path) -> dict[str, str]:
    folder.mkdir()
    for name in (*NAMES, "notes"):
        (folder / name).write_text("old")
    return contents(folder)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_write_together(tmp_path) -> None:
    earlier(tmp_path / "out")
    (tmp_path / "out/.unfinished").mkdir()
    (tmp_path / "out/.unfinished/weights").write_text("of a killed one")
    with write_together(tmp_path / "out", NAMES) as folder:
        assert not list(folder.iterdir())
        (folder / "weights").write_text("new")
        (folder / "record").write_text("new")
    # "other" would be of another export.
    assert contents(tmp_path / "out") == {"weights": "new", "record": "new", "notes": "old"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), OSError(28, "full")])
def test_write_together_fails(error, tmp_path) -> None:
    before = earlier(tmp_path / "out")
    with (
        pytest.raises(type(error)) as raised,
        write_together(tmp_path / "out", NAMES) as folder,
    ):
        (folder / "weights").write_text("new")
        raise error
    assert contents(tmp_path / "out") == before
    if isinstance(error, OSError):
        assert f"{tmp_path / 'out'} could not be written" in str(raised.value)


@pytest.mark.parametrize("steps", range(4))
def test_write_together_killed_between_its_renames(steps, tmp_path, monkeypatch) -> None:
    """The record is there only with the others that it is of."""
    before, replace = earlier(tmp_path / "out"), writing.os.replace
    done: list[Any] = []

    def count(*args: Any) -> None:
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(replace(*args))

    monkeypatch.setattr(writing.os, "replace", count)
    try:
        with write_together(tmp_path / "out", NAMES) as folder:
            for name in NAMES:
                (folder / name).write_text("new")
    except KeyboardInterrupt:
        assert "record" not in contents(tmp_path / "out")
    else:
        assert contents(tmp_path / "out") == before | dict.fromkeys(NAMES, "new")
