"""Which processes there are: torchrun's variables, SLURM's, or none."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from ssim_kd.engine import launch

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = {
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "node7",
    "SLURM_JOB_ID": "123456",
}


@pytest.fixture
def environment(monkeypatch):
    import os

    for name in list(os.environ):
        if name in NAMES or name.startswith("SLURM"):
            monkeypatch.delenv(name)

    def set_all(values: dict[str, str]) -> dict[str, str] | None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        return launch._rank_from_environment()

    return set_all


def test_outside_of_both(environment) -> None:
    assert environment({}) is None


def test_torchrun(environment) -> None:
    values = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "1"}
    assert environment(values) == {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def test_a_rank_without_its_world(environment) -> None:
    with pytest.raises(ValueError, match=r"RANK is set .* \['WORLD_SIZE', 'MASTER_PORT'\] are not"):
        environment({"RANK": "1", "MASTER_ADDR": "host"})


def test_slurm(environment) -> None:
    assert environment(SLURM) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node7",
        "MASTER_PORT": "23456",
    }


def test_slurm_with_several_hosts(environment, monkeypatch) -> None:
    def show(command, **_):
        assert command == ["scontrol", "show", "hostnames", "node[7-8]"]
        return SimpleNamespace(stdout="node7\nnode8\n")

    monkeypatch.setattr(subprocess, "run", show)
    found = environment({**SLURM, "SLURM_STEP_NODELIST": "node[7-8]", "MASTER_PORT": "5"})
    assert found is not None and (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("node7", "5")


def test_an_allocation_without_srun_is_one_process(environment) -> None:
    assert environment({k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}) is None
    assert environment({**SLURM, "SLURM_NTASKS": "1"}) is None
