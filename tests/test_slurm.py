"""tools/slurm.py: what SLURM is asked for, and a job of submitit that is preempted and resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

submitit = pytest.importorskip("submitit", reason="the extra slurm is not installed")

from tests.engine.runs import (  # noqa: E402
    ROOT,
    World,
    assert_same,
    checkpoint,
    log,
    wait_until,
)
from tools import slurm  # noqa: E402


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM", "SUBMITIT")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))


def children_of(pid: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.faults
@pytest.mark.timeout(600)  # four programs start, one after the other
def test_local_job_that_is_preempted_equals_the_whole(tmp_path: Path) -> None:
    world = World(tmp_path)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ("DATASETS.TEST", "()", "SOLVER.MAX_ITER", 20, "SOLVER.CHECKPOINT_PERIOD", 3)
    world.main(whole, *options)
    argv = ["--cluster", "local", "--folder", str(tmp_path / "jobs"), "--"]
    job = slurm.submit(slurm.parse([*argv, *world.arguments(cut, *options)]))
    assert not isinstance(job, str)
    try:
        wait_until(lambda: (cut / "model_0000002.pth").exists() or job.done(), 300)
        assert not job.done(), job.stderr()
        # As SLURM does: to every process of the step, the training included.
        (task,) = children_of(int(job.job_id))
        for pid in (task, *children_of(task)):
            os.kill(pid, signal.SIGUSR2)
        assert job.result() is None
    finally:
        job.cancel()
    text = log(cut)
    assert "saving a checkpoint" in text and "Resuming from" in text
    assert_same(checkpoint(whole), checkpoint(cut))


def fake_training(folder: Path, code: str) -> tuple[list[str], Path]:
    """A script in the place of train_net.py; it appends its arguments to a file."""
    script, calls = folder / "fake.py", folder / "calls.jsonl"
    start = "import json, os, signal, sys, time\n"
    start += f"print(json.dumps(sys.argv[1:]), file=open({str(calls)!r}, 'a'))\n"
    script.write_text(start + code)
    return [str(script)], calls


def test_command_submits_and_names_job_and_log(tmp_path: Path) -> None:
    (script,), calls = fake_training(tmp_path, "print('trained')")
    options = ["--cluster", "local", "--gpus-per-node", "2", "--folder", str(tmp_path / "jobs")]
    line = ["--config-file", "a.yaml", "--teacher", "t", "OUTPUT_DIR", "o"]
    command = [str(ROOT / "tools/slurm.py"), *options, "--script", script, "--", *line]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    job_id, place = done.stdout.split("; ")[0].removeprefix("Job "), done.stdout.split("; ")[1]
    file = Path(place.removeprefix("log: "))
    wait_until(lambda: file.is_file() and "trained" in file.read_text(), 60, done.stdout)
    assert job_id in file.name
    assert json.loads(calls.read_text()) == ["--num-gpus", "2", *line]


def test_print_shows_what_slurm_gets(tmp_path: Path, monkeypatch, capsys) -> None:
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    options = ["--nodes", "2", "--gpus-per-node", "8", "--partition", "gpu", "--time", "24:00"]
    folder = ["--folder", str(tmp_path / "jobs"), "--submitit", "slurm_account=vision"]
    assert slurm.main([*options, *folder, "--print", "--", "--config-file", "a.yaml"]) == 0
    text = capsys.readouterr().out
    for line in (
        *("nodes=2", "gpus-per-node=8", "ntasks-per-node=8", "partition=gpu", "time=1440"),
        *("signal=USR2@120", "requeue", "account=vision", "job-name=ssim_kd"),
    ):
        assert f"#SBATCH --{line}\n" in text
    assert "srun" in text and not (tmp_path / "jobs").exists()


def test_main_without_slurm(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.main(["--folder", str(tmp_path / "jobs"), "--", "--config-file", "a.yaml"]) == 1
    assert "--cluster local" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--nodes", "2"], '"--"'),
        (["--", "--config-file", "a", "--num-gpus", "8"], "--gpus-per-node"),
        (["--cluster", "local", "--nodes", "2", "--", "--config-file", "a"], "one node"),
        (["--time", "1:2:3", "--", "--config-file", "a"], "HOURS:MINUTES"),
        (["--", "--config", "a", "--unknown"], "--unknown"),
    ],
)
def test_parse_names_what_is_wrong(argv, expected, capsys) -> None:
    with pytest.raises(SystemExit):
        slurm.parse(argv)
    assert expected in capsys.readouterr().err


def test_minutes() -> None:
    assert [slurm.minutes(t) for t in ("90", "1:30", "24:00", "2-12:00")] == [90, 90, 1440, 3600]


@pytest.mark.parametrize(("restarts", "flags"), [("0", []), ("1", ["--resume"])])
def test_training_resumes_where_slurm_has_queued_it_again(
    restarts, flags, tmp_path, monkeypatch
) -> None:
    (script,), calls = fake_training(tmp_path, "")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    slurm.Training(script, ["--config-file", "a"])()
    assert json.loads(calls.read_text()) == [*flags, "--config-file", "a"]


@pytest.mark.parametrize(
    ("status", "rank", "fails"), [(143, 0, True), (143, 1, False), (75, 1, False), (1, 1, True)]
)
def test_training_that_ends(status, rank, fails, tmp_path, monkeypatch) -> None:
    """On SIGTERM (scancel) a job ends; other tasks of one that is queued again end well."""
    environment = lambda: SimpleNamespace(global_rank=rank)  # noqa: E731
    monkeypatch.setattr(slurm.submitit, "JobEnvironment", environment)
    # SLURM sends the signal of the requeue to the training too.
    code = f"os.kill(os.getpid(), signal.SIGUSR2)\nsys.exit({status})"
    (script,), _ = fake_training(tmp_path, code)
    if fails:
        with pytest.raises(RuntimeError, match=f"status {status}"):
            slurm.Training(script, [])()
    else:
        slurm.Training(script, [])()


def test_checkpoint_waits_for_the_training_in_the_signal_handler(tmp_path: Path) -> None:
    code = (
        "def end(*_): time.sleep(0.3); print('saved', file=open('saved.txt', 'w')); sys.exit(143)\n"
    )
    code += (
        "signal.signal(signal.SIGTERM, end)\nos.kill(os.getppid(), signal.SIGALRM)\ntime.sleep(60)"
    )
    (script,), _ = fake_training(tmp_path, code.replace("saved.txt", str(tmp_path / "saved.txt")))
    training = slurm.Training(script, ["--config-file", "a"])
    found: list[slurm.Training] = []

    def handler(*_: object) -> None:
        found.append(training.checkpoint().function)
        assert (tmp_path / "saved.txt").read_text() == "saved\n"
        raise SystemExit(-1)  # as submitit does

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(SystemExit):
            training()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert found[0].resume and found[0].arguments == ["--config-file", "a"]
