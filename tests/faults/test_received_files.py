"""Files and folders of others: they run no code, and a run writes to no file beyond its folder."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ssim_kd.engine import argument_parser, run
from ssim_kd.projects import add_project_configs
from ssim_kd.writing import write_together
from tests.engine.runs import World, assert_same, checkpoint, log
from tests.faults.store import store
from tests.faults.test_teachers import no_training
from tests.test_unpickling import ALTERS, POINTERS, RUNS_CODE, write

pytestmark = pytest.mark.faults

OPTIONS = ("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()", "DATASETS.TEST", "()")
ATTACKS = RUNS_CODE | ALTERS | POINTERS


@pytest.mark.parametrize("key", ["MODEL.DISTILL.TEACHER.WEIGHTS", "MODEL.WEIGHTS", "--resume"])
def test_weights_that_run_code(key, world: World, tmp_path, monkeypatch) -> None:
    """Some attacks of tests/test_unpickling.py, by each way that a file is read."""
    no_training(monkeypatch)
    (tmp_path / "payload.py").write_text("open('ran', 'w')\nfloat32 = Run = scalar = print\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for number, attack in enumerate(list(ATTACKS)[::9]):
        form = ("pkl", "pth", "pth of protocol 4", "pth without zip")[number % 4]
        if key == "--resume":
            form = "pth" if form == "pkl" else form
        path = write(form, ATTACKS[attack], tmp_path)
        out = tmp_path / f"out{number}"
        options = (key, path)
        if key == "--resume":
            out.mkdir()
            shutil.move(path, out / "model_0000000.pth")
            options = ("--resume",)
        with pytest.raises(ValueError, match=r"x\.p|none of the 1 checkpoints"):
            world.main(out, *options, *OPTIONS)
    assert not Path("ran").exists() and "payload" not in sys.modules


def test_folder_of_links(world: World, tmp_path) -> None:
    names = ["config.yaml", "student.yaml", ".lock", "log.txt", "metrics.json", "run.json"]
    names += ["model_final.pth", "model_0000001.pth", "last_checkpoint", "report.html"]
    out = tmp_path / "out"
    out.mkdir()
    for name in names:
        for suffix in ("", ".tmp"):
            (tmp_path / f"victim of {name}{suffix}").write_text("mine")
            (out / f"{name}{suffix}").symlink_to(tmp_path / f"victim of {name}{suffix}")
    world.main(out, *OPTIONS, "TEST.REPORT", True)
    victims = list(tmp_path.glob("victim *"))
    assert len(victims) == 2 * len(names)
    assert all(victim.read_text() == "mine" for victim in victims)
    assert (out / "model_final.pth").is_file() and not (out / "config.yaml").is_symlink()


def test_signed_url_stays_out_of_what_is_written(world: World, tmp_path) -> None:
    out = tmp_path / "out"
    options = (
        "MODEL.DISTILL.TEACHER.WEIGHTS",
        "store://teacher.pth?sig=SECRET",
        "TEST.REPORT",
        True,
    )
    with store(tmp_path) as root:
        shutil.copy(world.teacher, root / "teacher.pth")
        world.main(out, *OPTIONS, *options)
        world.main(out, "--resume", *OPTIONS, *options, "SOLVER.MAX_ITER", 3)
    assert "TEACHER.WEIGHTS: store" not in log(out)  # of the checkpoint, compared with its own
    files = [path for path in out.rglob("*") if path.is_file()]
    holding = [path.name for path in files if b"SECRET" in path.read_bytes()]
    assert {"config.yaml", "model_final.pth", "report.html"} <= {path.name for path in files}
    assert not holding


@pytest.mark.parametrize("key", ["MODEL.DISTILL.TEACHER.WEIGHTS", "MODEL.WEIGHTS"])
@pytest.mark.parametrize("content", [None, b"cut", b"\x80\x02K\x01."])
def test_signed_url_stays_out_of_messages(
    content: bytes | None, key: str, world: World, tmp_path, capfd
) -> None:
    out = tmp_path / "out"
    with store(tmp_path) as root, pytest.raises(SystemExit):
        if content is not None:
            (root / "teacher.pth").write_bytes(content)
        arguments = world.arguments(out, *OPTIONS, key, "store://teacher.pth?sig=SECRET")
        run(argument_parser().parse_args(arguments), add_project_configs)
    shown = capfd.readouterr()
    assert "ERROR: " in shown.err and "store://teacher.pth" in shown.err
    assert "SECRET" not in shown.err + shown.out + log(out)


def test_remote_folder_resumed(world: World, tmp_path) -> None:
    """As a local one, bit for bit, from the checkpoint before a damaged one."""
    options = ("SOLVER.MAX_ITER", 6, "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", 2)
    options += ("SOLVER.CHECKPOINTS_TO_KEEP", 2)
    world.main(tmp_path / "local", *options)
    # A name that TensorBoard's writer knows as well.
    with store(tmp_path, prefix="memory://", append=True) as root:
        remote: Any = "memory://out"
        out = root / "out"
        world.main(remote, *options)
        assert_same(checkpoint(tmp_path / "local"), checkpoint(out))
        names = ["model_0000003.pth", "model_0000005.pth"]
        assert sorted(path.name for path in out.glob("model_0*.pth")) == names
        assert (out / "model_best.pth").exists() == (tmp_path / "local/model_best.pth").exists()
        (out / "model_final.pth").unlink()
        (out / "model_0000005.pth").write_bytes(b"cut")
        world.main(remote, "--resume", *options)
        assert "Starting training from iteration 4" in log(out)
        assert_same(checkpoint(tmp_path / "local"), checkpoint(out))
        world.main(remote, *options, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()")
        assert "checkpoints of an earlier run" in log(out)
        assert sorted(path.name for path in out.glob("model_0*.pth"))[-2:] == names


def export(folder: Path, number: int) -> None:
    content = random.Random(number).randbytes(2_000_000)
    with write_together(folder, ("model.pth", "model.ts", "export.json")) as unfinished:
        for name in ("model.pth", "model.ts")[: 1 + number % 2]:
            (unfinished / name).write_bytes(content)
        (unfinished / "export.json").write_text(hashlib.sha256(content).hexdigest())


def test_export_killed(tmp_path) -> None:
    """50 kills: the record is there only with the files that it is of."""
    export(tmp_path / "out", 1)
    draw, complete = random.Random(0), 0
    for trial in range(50):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            for number in range(2, 1000):
                export(tmp_path / "out", number)
                os.write(write, b".")
            os._exit(0)
        if trial % 2:  # however slow the disk is: at least one has come through
            os.read(read, 1)
        time.sleep(draw.uniform(0.001, 0.06))
        os.close(read)
        os.close(write)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        files = {path.name: path for path in (tmp_path / "out").iterdir() if path.is_file()}
        if "export.json" in files:
            complete += 1
            expected = files.pop("export.json").read_text()
            assert files, trial
            for path in files.values():
                assert hashlib.sha256(path.read_bytes()).hexdigest() == expected, (trial, path)
    assert complete >= 5  # a kill between the renames leaves none until an export comes through


def test_teacher_of_the_output_folder(world: World, tmp_path, monkeypatch) -> None:
    """``--teacher output`` with OUTPUT_DIR at its default, ./output."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world.folder, tmp_path / "output", ignore=shutil.ignore_patterns("digits"))
    shutil.move("output/teacher.pth", "output/model_final.pth")
    shutil.move("output/teacher.yaml", "output/config.yaml")
    before = {p.name: p.read_bytes() for p in Path("output").iterdir() if p.is_file()}
    for name in ("output", "./output/config.yaml", "output/../output/model_final.pth"):
        with pytest.raises(ValueError, match=r"OUTPUT_DIR is 'output', the folder of the teacher"):
            world.main("output", *OPTIONS, "MODEL.DISTILL.TEACHER.CONFIG_FILE", name)  # type: ignore[arg-type]
    assert before == {p.name: p.read_bytes() for p in Path("output").iterdir() if p.is_file()}
    torch.load("output/model_final.pth", weights_only=True)
