"""Which processes there are: torchrun's variables, SLURM's, or none."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from ssim_kd.engine import argument_parser, launch

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


def test_rank_from_environment_outside(environment) -> None:
    assert environment({}) is None


TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "1",
}


def test_rank_from_environment_torchrun(environment) -> None:
    assert environment(TORCHRUN) == TORCHRUN


@pytest.mark.parametrize("name", [name for name in NAMES if name != "RANK"])
def test_rank_from_environment_missing_variable(name, environment) -> None:
    with pytest.raises(ValueError, match=rf"RANK .*\['{name}'\]"):
        environment({k: v for k, v in TORCHRUN.items() if k != name})


def test_rank_from_environment_slurm(environment) -> None:
    assert environment(SLURM) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node7",
        "MASTER_PORT": "23456",
    }


def test_rank_from_environment_slurm_hosts(environment, monkeypatch) -> None:
    def show(command, **_):
        assert command == ["scontrol", "show", "hostnames", "node[7-8]"]
        return SimpleNamespace(stdout="node7\nnode8\n")

    monkeypatch.setattr(subprocess, "run", show)
    found = environment({**SLURM, "SLURM_STEP_NODELIST": "node[7-8]", "MASTER_PORT": "5"})
    assert found is not None and (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("node7", "5")


def test_rank_from_environment_interactive(environment) -> None:
    assert environment({k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}) is None
    assert environment({**SLURM, "SLURM_NTASKS": "1"}) is None
    # An interactive step of salloc, whose SLURM_NTASKS is the job's.
    assert (
        environment({**SLURM, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}) is None
    )


def test_rank_from_environment_small_step(environment) -> None:
    found = environment({**SLURM, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4"})
    assert found is not None and found["WORLD_SIZE"] == "4"


def start(*arguments: str, device: str = "cpu") -> object:
    args = argument_parser().parse_args(list(arguments))
    return launch.launch_processes(lambda: "ran", args, device=device, main_args=())


@pytest.mark.parametrize("variables", [TORCHRUN | {"WORLD_SIZE": "1"}, SLURM])
def test_launch_processes_contradicts_the_launcher(variables, environment) -> None:
    environment(variables)
    expected = r"--num-gpus is 2 and --num-machines 3, 6 processes"
    with pytest.raises(ValueError, match=expected):
        start("--num-gpus", "2", "--num-machines", "3")


@pytest.mark.parametrize("arguments", [(), ("--num-gpus", "2"), ("--num-gpus", "0")])
def test_launch_processes_agrees_with_the_launcher(arguments, environment, monkeypatch) -> None:
    environment(TORCHRUN)
    monkeypatch.setattr(launch, "_join", lambda **_: None)
    monkeypatch.setattr(launch.dist, "destroy_process_group", lambda: None)
    assert start(*arguments) == "ran"


def test_launch_processes_of_no_process(environment) -> None:
    environment({})
    for wrong in (("0", "2"), ("-1", "1"), ("1", "0"), ("2", "-1")):
        with pytest.raises(
            ValueError, match=rf"--num-gpus is {wrong[0]} and --num-machines {wrong[1]}"
        ):
            start("--num-gpus", wrong[0], "--num-machines", wrong[1])
    assert start("--num-gpus", "0") == "ran"


def test_launch_processes_too_few_gpus(environment, monkeypatch) -> None:
    environment({})
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"--num-gpus is 2 .* 1 GPUs"):
        start("--num-gpus", "2", device="cuda")


def test_launch_processes_auto_url(environment) -> None:
    environment({})
    with pytest.raises(ValueError, match="--dist-url is auto and --num-machines 2"):
        start("--num-gpus", "1", "--num-machines", "2", "--dist-url", "auto")


def test_join_one_visible_gpu(monkeypatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(launch.torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(launch.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(launch.dist, "get_world_size", lambda: 0)
    monkeypatch.setattr(launch.comm, "synchronize", lambda: None)
    monkeypatch.setattr(launch.comm, "create_local_process_group", lambda _: None, raising=False)
    launch._join(cuda=True, init_method="env://", local_rank=3, ranks_per_machine=4)
    assert chosen == [0]
