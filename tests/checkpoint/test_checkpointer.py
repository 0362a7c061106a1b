"""Checkpoints: whole or not there, read with suspicion, pruned."""

from __future__ import annotations

import logging
import os
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
from detectron2.checkpoint import detection_checkpoint
from detectron2.config import get_cfg
from torch import nn

from ssim_kd.checkpoint import BEST, is_of_last_run
from ssim_kd.checkpoint.checkpointer import StudentCheckpointer
from ssim_kd.engine.preflight import check_start, settings_of


class Iteration:
    """Something that has a state next to the model's."""

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


def make(folder: Path, **options: Any) -> tuple[StudentCheckpointer, Iteration]:
    counter = Iteration()
    torch.manual_seed(0)
    return StudentCheckpointer(Detector(), str(folder), trainer=counter, **options), counter


def save(folder: Path, *numbers: int, resumed: bool = False, **options: Any) -> None:
    checkpointer, counter = make(folder, **options)
    assert not resumed or checkpointer.resume_or_load("", resume=True)
    for number in numbers:
        counter.value = number
        nn.init.constant_(checkpointer.model.backbone.weight, number)
        checkpointer.save(f"model_{number:07d}", iteration=number)


def resume(folder: Path) -> int:
    checkpointer, counter = make(folder)
    assert checkpointer.resume_or_load("", resume=True)
    assert torch.all(checkpointer.model.backbone.weight == counter.value)
    return counter.value


def truncate(folder: Path, name: str = "model_0000003.pth") -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda data: data[:-500], "model_0000003.pth"),
        (lambda data: data[:50000] + bytes(64) + data[50064:], "model_0000003.pth"),
        (lambda _: b"", "model_0000003.pth"),
        (None, "last_checkpoint"),
    ],
    ids=["cut", "changed", "empty", "gone"],
)
def test_resume_or_load_damaged_checkpoint(damage, named, tmp_path, caplog) -> None:
    save(tmp_path, 1, 2, 3)
    path = tmp_path / "model_0000003.pth"
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    assert resume(tmp_path) == 2
    assert named in caplog.text


@pytest.mark.parametrize("tag", [b"", b"model_0000009.pth", b"\x00\xff\n", None])
def test_resume_or_load_damaged_tag(tag, tmp_path) -> None:
    save(tmp_path, 1, 2, 3)
    (tmp_path / "last_checkpoint").unlink()
    if tag is not None:
        (tmp_path / "last_checkpoint").write_bytes(tag)
    assert resume(tmp_path) == 3


def test_resume_or_load_no_readable_checkpoint(tmp_path) -> None:
    save(tmp_path, 3)
    truncate(tmp_path)
    with pytest.raises(ValueError, match="--resume: none of the 1 checkpoints"):
        make(tmp_path)[0].resume_or_load("", resume=True)
    assert not make(tmp_path)[0].resume_or_load("", resume=False)


def test_resume_or_load_another_program(tmp_path) -> None:
    torch.save({"model": Detector().state_dict(), "iteration": 3}, tmp_path / "model_0000003.pth")
    with pytest.raises(ValueError, match=r"lacks \['trainer'\]"):
        make(tmp_path)[0].resume_or_load("", resume=True)


def test_save_tags_after_it_wrote(tmp_path, monkeypatch) -> None:
    save(tmp_path, 1)
    checkpointer, _ = make(tmp_path)

    def fail(_name: str) -> None:
        assert (tmp_path / "model_0000002.pth").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpointer, "tag_last_checkpoint", fail)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model_0000002")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


def test_resume_or_load_removes_unfinished_files(tmp_path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "model_0000003.pth.tmp").write_bytes(b"half")
    (tmp_path / "notes.tmp").write_bytes(b"the user's")
    assert resume(tmp_path) == 2
    assert not (tmp_path / "model_0000003.pth.tmp").exists()
    assert (tmp_path / "notes.tmp").exists()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pth"))


def test_save_prunes(tmp_path) -> None:
    save(tmp_path, 1, 2, 10, 3, keep=2)
    assert names(tmp_path) == ["model_0000003.pth", "model_0000010.pth"]
    checkpointer, _ = make(tmp_path, keep=1)
    assert checkpointer.resume_or_load("", resume=True)
    checkpointer.save("model_final")
    checkpointer.save("model_0000011", iteration=11)
    assert names(tmp_path) == ["model_0000011.pth", "model_final.pth"]
    with pytest.raises(ValueError, match="CHECKPOINTS_TO_KEEP is -1"):
        make(tmp_path, keep=-1)


def test_save_prunes_nothing_of_another_run(tmp_path) -> None:
    save(tmp_path, 1, 5, 8)
    (tmp_path / "model_0000008.pth").write_bytes(b"whose")
    checkpointer, _ = make(tmp_path, keep=1)
    checkpointer.resume_or_load("", resume=False)
    for number in (2, 5, 7):
        checkpointer.save(f"model_{number:07d}", iteration=number)
    others = ["model_0000001.pth", "model_0000008.pth"]
    assert names(tmp_path) == sorted([*others, "model_0000007.pth"])
    # Nor after a resume, which takes up the run.
    save(tmp_path, 9, keep=1, resumed=True)
    assert names(tmp_path) == sorted([*others, "model_0000009.pth"])


def test_newest_after_a_copy(tmp_path) -> None:
    """Whose files have other times, and no last_checkpoint."""
    save(tmp_path, 1, 3, 5, 7)
    (tmp_path / "last_checkpoint").unlink()
    for age, path in enumerate(sorted(tmp_path.glob("*.pth"))):
        os.utime(path, (1e9 - age, 1e9 - age))
    assert resume(tmp_path) == 7
    # One of a later run comes first, though it is of an earlier iteration.
    save(tmp_path, 2)
    (tmp_path / "last_checkpoint").unlink()
    assert resume(tmp_path) == 2
    save(tmp_path, 4, resumed=True)
    truncate(tmp_path, "model_0000004.pth")
    assert resume(tmp_path) == 2


@pytest.mark.parametrize("tag", ["../out/model_0000001.pth", "{folder}/model_0000001.pth"])
def test_newest_tag_beyond_the_folder(tag, tmp_path, caplog) -> None:
    """Even one that names a checkpoint of the folder in a roundabout way."""
    folder = tmp_path / "out"
    folder.mkdir()
    save(folder, 1, 2)
    tag = tag.format(folder=folder)
    (folder / "last_checkpoint").write_text(tag)
    assert make(folder)[0].get_checkpoint_file() == ""
    assert resume(folder) == 2
    assert repr(tag) in caplog.text


def test_keep_best(tmp_path) -> None:
    save(tmp_path, 1, 2)
    make(tmp_path)[0].keep_best()
    assert make(tmp_path)[0].read("model_best.pth")["iteration"] == 2


def test_resume_or_load_anew_next_to_an_earlier_run(tmp_path, caplog) -> None:
    save(tmp_path, 1, 5)
    (tmp_path / "model_best.pth").touch()
    checkpointer, _ = make(tmp_path, keep=1)
    assert not checkpointer.resume_or_load("", resume=False)
    assert "3 checkpoints" in caplog.text
    assert "model_0000005.pth" in caplog.text and "model_best.pth" in caplog.text
    # It was killed before it saved.
    assert make(tmp_path)[0].newest() is None
    # It saved: nothing but its own counts.
    save(tmp_path, 2)
    assert resume(tmp_path) == 2


def test_is_of_last_run(tmp_path) -> None:
    """A run without --resume leaves the best of an earlier one next to its own config."""

    def found() -> dict[str, bool]:
        return {path.name: is_of_last_run(str(path)) for path in tmp_path.glob("*.pth")}

    save(tmp_path, 1)
    make(tmp_path)[0].keep_best()
    assert found() == {"model_0000001.pth": True, BEST: True}
    checkpointer, _ = make(tmp_path)
    checkpointer.resume_or_load("", resume=False)
    assert found() == {"model_0000001.pth": False, BEST: False}
    checkpointer.save("model_0000002", iteration=2)
    assert found() == {"model_0000001.pth": False, "model_0000002.pth": True, BEST: False}
    checkpointer.keep_best()
    assert found()[BEST]


def test_resume_or_load_tag_without_checkpoint(tmp_path) -> None:
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    with pytest.raises(ValueError, match=r"last_checkpoint .* model_0000009\.pth"):
        make(tmp_path)[0].resume_or_load("", resume=True)


def test_resume_or_load_weights_that_fit_in_part(tmp_path, caplog) -> None:
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
        with pytest.raises(
            ValueError, match=r"MODEL.WEIGHTS is .*start.pth.*: 1 keys .* backbone\.bias"
        ):
            make(tmp_path)[0].resume_or_load(str(path), resume=False)
        checkpointer, _ = make(tmp_path, partial=True)
        checkpointer.resume_or_load(str(path), resume=False)
        assert torch.equal(checkpointer.model.backbone.weight, state["backbone.weight"])


@pytest.mark.parametrize(
    ("options", "loaded"),
    [("?matching_heuristics=True", True), ("?matching_heuristics=False", False), ("", False)],
)
def test_load_file_options_of_main(options, loaded, tmp_path) -> None:
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
    checkpointer._parsed_url_during_load = urlparse(f"{path}?heuristics=True")
    with pytest.raises(ValueError, match=r"start\.pth\?heuristics=True'.*options \['heuristics'\]"):
        checkpointer._load_file(str(path))


@pytest.mark.skipif(
    not hasattr(detection_checkpoint, "parse_qs"), reason="an option of Detectron2 main"
)
def test_resume_or_load_options_of_main(tmp_path) -> None:
    state = {k.removeprefix("backbone."): v + 1 for k, v in Detector().state_dict().items()}
    torch.save(state, tmp_path / "start.pth")
    path = f"{tmp_path}/start.pth?matching_heuristics=True"
    cfg = get_cfg()
    cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS = str(tmp_path), path
    check_start(settings_of(cfg), resume=False)
    checkpointer, _ = make(tmp_path)
    checkpointer.resume_or_load(path, resume=False)
    assert torch.equal(checkpointer.model.backbone.weight, state["weight"])


@pytest.mark.parametrize(
    "form",
    [
        {"model": {"head.weight": torch.ones(2, 100)}},
        {"ema": Detector().state_dict()},
        {"model": "text"},
    ],
)
def test_resume_or_load_names_key_and_file_of_unfit_weights(form, tmp_path) -> None:
    torch.save(form, tmp_path / "start.pth")
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is .*start\.pth"):
        make(tmp_path)[0].resume_or_load(str(tmp_path / "start.pth"), resume=False)


def test_resume_or_load_wrapped_weights(tmp_path, monkeypatch) -> None:
    """In the user's home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    state = {name: value + 1 for name, value in Detector().state_dict().items()}
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "s.pth")
    checkpointer, _ = make(tmp_path)
    checkpointer.resume_or_load("~/s.pth", resume=False)
    assert torch.equal(checkpointer.model.head.weight, state["head.weight"])


class Holder:
    """A hook that has any state."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"hooks": {"Best": {"best": self.value}}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["hooks"]["Best"]["best"]


# What is saved, and what a resume reads.
STATES: list[tuple[Any, Any]] = [
    (np.float64(3.5), 3.5),
    (np.int32(3), 3),
    (np.bool_(True), True),
    (np.str_("a"), "a"),
    ([np.float32(0.5), (np.int64(1), None)], [0.5, (1, None)]),
    ({np.int64(3): "a"}, {3: "a"}),
]
SAME = (Counter("aab"), OrderedDict(b=1, a=2), {1, 2}, 1j, 2**80, b"x")
STATES += [(x, x) for x in (*SAME, torch.Size([2]), torch.float16, torch.device("cpu"))]


def resumed(value: Any, folder: Path) -> Any:
    first = StudentCheckpointer(Detector(), str(folder), trainer=Holder(value))
    first.save("model_0000001", iteration=1)
    holder = Holder(None)
    assert StudentCheckpointer(Detector(), str(folder), trainer=holder).resume_or_load("")
    return holder.value


@pytest.mark.parametrize(("value", "expected"), STATES, ids=repr)
def test_save_state_that_a_resume_reads(value, expected, tmp_path) -> None:
    found = resumed(value, tmp_path)
    assert found == expected and type(found) is type(expected)


def test_save_arrays_and_tensors(tmp_path) -> None:
    array = np.arange(6.0).reshape(2, 3)[:, ::-1]
    assert np.array_equal(resumed(array, tmp_path), array)
    tensor = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    assert torch.equal(resumed(tensor, tmp_path), tensor)


@pytest.mark.parametrize(
    "value",
    [
        Path("x"),
        range(3),
        deque([1]),
        defaultdict(list),
        np.array([None]),
        np.dtype("f4"),
        np.datetime64("2020-01-01"),
        Detector(),
        lambda: None,
    ],
    ids=lambda value: type(value).__name__,
)
def test_save_state_that_a_resume_does_not_read(value, tmp_path) -> None:
    with pytest.raises(ValueError, match="trainer/hooks/Best/best"):
        resumed(value, tmp_path)
    assert not list(tmp_path.iterdir())
