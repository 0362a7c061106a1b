"""Trainings in separate processes: what SLURM is asked for, times, an interruption."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest

from ssim_kd.comparing import running
from tests.engine.runs import wait_until

SBATCH = """#!/bin/sh
[ "$1" = --version ] || { cat "$1" > "$STAND_IN_DATA/submitted.sh"; echo "Submitted batch job 42"; }
"""


def test_slurm_gets_one_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sbatch", "srun"):
        path = tmp_path / name
        path.write_text(SBATCH)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN_DATA", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "")
    parameters = {"slurm_partition": "small", "gpus_per_node": "1", "timeout_min": "90"}
    executor = running.build_executor("slurm", tmp_path / "jobs", 4, parameters)
    with executor.batch():
        jobs = [executor.submit(max, 1, seed) for seed in range(7)]
    assert [job.job_id for job in jobs] == [f"42_{place}" for place in range(7)]
    submitted = (tmp_path / "submitted.sh").read_text()
    for line in ("array=0-6%4", "partition=small", "gpus-per-node=1", "time=90"):
        assert f"#SBATCH --{line}\n" in submitted
    # The job finds this package.
    assert str(running.ROOT) in os.environ["PYTHONPATH"].split(os.pathsep)


def test_time_adds_up_over_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed attempt leaves the time unknown; one that ended by itself is added."""
    monkeypatch.setattr(running, "measure", lambda out, request, measured: dict(measured))
    script = tmp_path / "train.py"
    script.write_text("import time; sum(range(3_000_000)); import sys; sys.exit(int(sys.argv[1]))")
    request = {"fingerprint": "x", "command": [sys.executable, str(script)], "opts": ["1"]}
    request["cwd"] = str(tmp_path)
    folder = tmp_path / "run"
    with pytest.raises(running.TrainingError, match="exit status 1"):
        running.train(request, str(folder))
    first = json.loads((folder / running.MEASURED).read_text())
    done = running.train({**request, "opts": ["0"]}, str(folder))
    assert done["seconds"] > first["seconds"] > 0
    assert "running" not in done

    (folder / running.FINISHED).unlink()
    (folder / running.MEASURED).write_text(json.dumps({**first, "running": 1}))
    killed = running.train({**request, "opts": ["0"]}, str(folder))
    assert killed["cpu_seconds"] is None and killed["seconds"] is None
    assert killed["peak_memory_mb"] > 0


TRAINING = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path("saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
pathlib.Path("started").touch()
time.sleep(60)
"""


def wait_for_training(folder: Path) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
    running._call([sys.executable, "train.py"], folder, str(folder))


def test_ctrl_c_lets_a_training_save(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAINING)
    process = multiprocessing.get_context("fork").Process(
        target=wait_for_training, args=(tmp_path,)
    )
    process.start()
    wait_until((tmp_path / "started").exists, 60)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all processes of the group
    process.join()
    assert process.exitcode != 0
    assert (tmp_path / "saved").exists()
