"""train_net.py as a user calls it, by several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.runs import ROOT, World, assert_same, checkpoint, free_port


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def start(*arguments: str, module: tuple[str, ...] = ()) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, *module, str(ROOT / "train_net.py"), *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**env, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    return output


SHORT = ("SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()")


@pytest.fixture(scope="module")
def spawn(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training by two processes that --num-gpus starts."""
    folder = tmp_path_factory.mktemp("spawn")
    output = finish(start(*world.arguments(folder, "--num-gpus", "--dist-url=auto", *SHORT)))
    assert checkpoint(folder)["trainer"]["data"]["processes"] == 2
    # A run that nothing is wrong with prints no warning of libraries about each other.
    noise = ("torch.jit.script", "meshgrid", "TypedStorage", "broadcast_buffers", "USDT")
    assert not [word for word in noise if word in output]
    return folder


def test_torchrun_comes_to_the_weights_of_num_gpus(world, spawn, tmp_path) -> None:
    place = ("--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}")
    torchrun = ("-m", "torch.distributed.run", *place)
    finish(start(*world.arguments(tmp_path, *SHORT), module=torchrun))
    assert_same(checkpoint(spawn), checkpoint(tmp_path))


def test_two_machines_come_to_the_weights_of_one(world, spawn, tmp_path) -> None:
    """Two launches that meet at an address, by Detectron2's flags."""
    meet = ("--num-machines=2", f"--dist-url=tcp://127.0.0.1:{free_port()}")
    processes = [
        start(*world.arguments(tmp_path, *meet, f"--machine-rank={rank}", *SHORT))
        for rank in (0, 1)
    ]
    for process in processes:
        finish(process)
    assert_same(checkpoint(spawn), checkpoint(tmp_path))
