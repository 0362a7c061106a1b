"""Checkpoints: whole or not there, read with suspicion, pruned."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import torch
from detectron2.checkpoint import detection_checkpoint
from detectron2.config import get_cfg
from torch import nn

from ssim_kd.checkpoint import files
from ssim_kd.checkpoint.checkpointer import StudentCheckpointer
from ssim_kd.checkpoint.files import write_atomically
from ssim_kd.engine.preflight import check_start


class Counter:
    """Something that has a state beside the model's."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(200, 100)
        self.head = nn.Linear(100, 2)


def make(folder: Path, **options: Any) -> tuple[StudentCheckpointer, Counter]:
    counter = Counter()
    torch.manual_seed(0)
    return StudentCheckpointer(Detector(), str(folder), trainer=counter, **options), counter


def save(folder: Path, *numbers: int, **options: Any) -> None:
    checkpointer, counter = make(folder, **options)
    for number in numbers:
        counter.value = number
        nn.init.constant_(checkpointer.model.backbone.weight, number)
        checkpointer.save(f"model_{number:07d}", iteration=number)
        # The next one has to be newer.
        os.utime(folder / f"model_{number:07d}.pth", (number, number))


def resume(folder: Path) -> int:
    checkpointer, counter = make(folder)
    assert checkpointer.resume_or_load("", resume=True)
    assert torch.all(checkpointer.model.backbone.weight == counter.value)
    return counter.value


def truncate(folder: Path) -> None:
    path = folder / "model_0000003.pth"
    path.write_bytes(path.read_bytes()[:-500])


def flip(folder: Path) -> None:
    path = folder / "model_0000003.pth"
    data = bytearray(path.read_bytes())
    for i in range(64):
        data[len(data) // 2 + i] ^= 0xFF
    path.write_bytes(data)


def empty(folder: Path) -> None:
    (folder / "model_0000003.pth").write_bytes(b"")


def delete(folder: Path) -> None:
    (folder / "model_0000003.pth").unlink()


@pytest.mark.parametrize("damage", [truncate, flip, empty, delete])
def test_the_checkpoint_before_a_damaged_one_is_taken(damage, tmp_path, caplog) -> None:
    save(tmp_path, 1, 2, 3)
    damage(tmp_path)
    assert resume(tmp_path) == 2
    expected = "names no file" if damage is delete else "model_0000003.pth"
    assert expected in caplog.text


@pytest.mark.parametrize("tag", [b"", b"model_0000009.pth", b"\x00\xff\n", None])
def test_the_newest_checkpoint_is_taken_where_the_tag_is_damaged(tag, tmp_path) -> None:
    save(tmp_path, 1, 2, 3)
    (tmp_path / "last_checkpoint").unlink()
    if tag is not None:
        (tmp_path / "last_checkpoint").write_bytes(tag)
    assert resume(tmp_path) == 3


def test_no_training_starts_anew_where_no_checkpoint_can_be_read(tmp_path) -> None:
    save(tmp_path, 3)
    truncate(tmp_path)
    with pytest.raises(ValueError, match=r"none of the 1 checkpoints in .* can be read"):
        make(tmp_path)[0].resume_or_load("", resume=True)
    assert not make(tmp_path)[0].resume_or_load("", resume=False)


def test_a_checkpoint_of_another_program_is_refused(tmp_path) -> None:
    torch.save({"model": Detector().state_dict(), "iteration": 3}, tmp_path / "model_0000003.pth")
    with pytest.raises(ValueError, match=r"lacks \['trainer'\]"):
        make(tmp_path)[0].resume_or_load("", resume=True)


def test_a_checkpoint_that_runs_code_is_not_run(tmp_path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"model": Evil(), "trainer": {}}, tmp_path / "model_0000003.pth")
    with pytest.raises(ValueError, match="can be read"):
        make(tmp_path)[0].resume_or_load("", resume=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("unexpected pos 1 vs 2")])
@pytest.mark.parametrize("written", [b"", b"half"])
def test_a_write_that_fails_leaves_the_old_file_alone(error, written, tmp_path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file: Any) -> None:
        file.write(written)
        file.flush()
        raise error

    with pytest.raises(OSError, match=r"could not be written \(\d+ bytes are free.*Earlier"):
        write_atomically(str(path), fail)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch) -> None:
    steps = []
    monkeypatch.setattr(files.os, "fsync", lambda _: steps.append("sync"))
    rename = os.replace
    monkeypatch.setattr(files.os, "replace", lambda *a: (steps.append("rename"), rename(*a)))
    write_atomically(str(tmp_path / "file"), lambda file: file.write(b"x"))
    assert steps == ["sync", "rename", "sync"]


def test_the_tag_is_written_after_the_checkpoint(tmp_path, monkeypatch) -> None:
    save(tmp_path, 1)
    checkpointer, _ = make(tmp_path)

    def fail(_name: str) -> None:
        assert (tmp_path / "model_0000002.pth").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpointer, "tag_last_checkpoint", fail)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model_0000002")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


def test_what_a_killed_run_left_half_written_is_removed(tmp_path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "model_0000003.pth.tmp").write_bytes(b"half")
    (tmp_path / "notes.tmp").write_bytes(b"the user's")
    assert resume(tmp_path) == 2
    assert not (tmp_path / "model_0000003.pth.tmp").exists()
    assert (tmp_path / "notes.tmp").exists()


def test_old_checkpoints_are_pruned(tmp_path) -> None:
    save(tmp_path, 1, 2, 10, 3, keep=2)
    # 10 is of a later iteration: one that could not be read when the run was resumed.
    left = sorted(p.name for p in tmp_path.glob("*.pth"))
    assert left == ["model_0000003.pth", "model_0000010.pth"]
    make(tmp_path, keep=1)[0].save("model_final")
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [
        "model_0000010.pth",
        "model_final.pth",
    ]
    save(tmp_path, 4, keep=1)
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [
        "model_0000004.pth",
        "model_final.pth",
    ]
    with pytest.raises(ValueError, match="CHECKPOINTS_TO_KEEP is -1"):
        make(tmp_path, keep=-1)


def test_a_run_that_starts_anew_does_not_resume_an_earlier_one(tmp_path, caplog) -> None:
    save(tmp_path, 1, 5)
    checkpointer, _ = make(tmp_path, keep=1)
    assert not checkpointer.resume_or_load("", resume=False)
    assert "holds 2 checkpoints of an earlier run, e.g. model_0000005.pth" in caplog.text
    # It was killed before it saved.
    assert make(tmp_path)[0].newest() is None
    # It saved: nothing but its own counts, and the earlier run's make room first.
    save(tmp_path, 2, keep=1)
    assert resume(tmp_path) == 2
    assert [p.name for p in tmp_path.glob("*.pth")] == ["model_0000002.pth"]


def test_a_tag_without_any_checkpoint_is_no_fresh_start(tmp_path) -> None:
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    with pytest.raises(ValueError, match=r"names model_0000009\.pth, which is not there"):
        make(tmp_path)[0].resume_or_load("", resume=True)


def test_the_tagged_checkpoint_comes_before_a_newer_file(tmp_path) -> None:
    save(tmp_path, 1, 2)
    later = time.time() + 100
    os.utime(tmp_path / "model_0000001.pth", (later, later))
    assert resume(tmp_path) == 2


def test_weights_to_start_from_must_fit_the_backbone(tmp_path, caplog) -> None:
    state = Detector().state_dict()
    path = tmp_path / "start.pth"
    headless = {k: v for k, v in state.items() if k.startswith("backbone")}
    torch.save({"model": headless}, path)
    with caplog.at_level(logging.WARNING):
        assert not make(tmp_path)[0].resume_or_load(str(path), resume=False)
    assert "head.{bias, weight}" in caplog.text

    for wrong in (
        {"backbone.weight": state["backbone.weight"]},
        {**state, "backbone.bias": torch.ones(3)},
    ):
        torch.save({"model": wrong}, path)
        with pytest.raises(ValueError, match=r"MODEL.WEIGHTS does not fit the student's backbone"):
            make(tmp_path)[0].resume_or_load(str(path), resume=False)


@pytest.mark.parametrize(
    ("options", "loaded"),
    [("?matching_heuristics=True", True), ("?matching_heuristics=False", False), ("", False)],
)
def test_options_behind_the_name(options, loaded, tmp_path) -> None:
    """Keys that lack their prefix are matched by heuristics: an option of Detectron2 main."""
    state = {k.removeprefix("backbone."): v + 1 for k, v in Detector().state_dict().items()}
    path = tmp_path / "start.pth"
    torch.save(state, path)
    checkpointer, _ = make(tmp_path)
    checkpointer._parsed_url_during_load = urlparse(f"{path}{options}")
    found = checkpointer._load_file(str(path))
    assert found.get("matching_heuristics", False) is loaded
    if loaded:
        checkpointer._load_model(found)
        assert torch.equal(checkpointer.model.backbone.weight, state["weight"])


def test_unknown_options_behind_the_name(tmp_path) -> None:
    torch.save(Detector().state_dict(), tmp_path / "start.pth")
    checkpointer, _ = make(tmp_path)
    checkpointer._parsed_url_during_load = urlparse(f"{tmp_path}/start.pth?heuristics=True")
    with pytest.raises(ValueError, match=r"start\.pth\?heuristics=True'.*options \['heuristics'\]"):
        checkpointer._load_file(f"{tmp_path}/start.pth")


@pytest.mark.skipif(
    not hasattr(detection_checkpoint, "parse_qs"), reason="an option of Detectron2 main"
)
def test_a_start_with_options(tmp_path) -> None:
    state = {k.removeprefix("backbone."): v + 1 for k, v in Detector().state_dict().items()}
    torch.save(state, tmp_path / "start.pth")
    path = f"{tmp_path}/start.pth?matching_heuristics=True"
    cfg = get_cfg()
    cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS = str(tmp_path), path
    check_start(cfg, resume=False)
    checkpointer, _ = make(tmp_path)
    checkpointer.resume_or_load(path, resume=False)
    assert torch.equal(checkpointer.model.backbone.weight, state["weight"])
