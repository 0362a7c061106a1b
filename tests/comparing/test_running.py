"""What SLURM is asked for, by a stand-in for sbatch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools.comparing import running

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
