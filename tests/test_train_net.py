"""train_net.py as a user calls it, and what it leaves in the hands of stock Detectron2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.runs import ROOT, World, assert_same, checkpoint, free_port

# Without ssim_kd: an import of it fails.
STOCK = """
import sys
sys.modules["ssim_kd"] = sys.modules["projects"] = None
import numpy, torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
folder = sys.argv[1]
cfg = get_cfg()
cfg.merge_from_file(f"{folder}/student.yaml")
cfg.MODEL.WEIGHTS = f"{folder}/model_final.pth"
result = build_model(cfg).load_state_dict(torch.load(cfg.MODEL.WEIGHTS)["model"])
assert not result.missing_keys and not result.unexpected_keys
found = DefaultPredictor(cfg)(numpy.zeros((96, 96, 3), dtype=numpy.uint8))
print("instances", len(found["instances"]))
"""


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


def test_student_in_the_hands_of_stock_detectron2(spawn: Path, tmp_path: Path) -> None:
    """Stock Detectron2 can use it."""
    stock = subprocess.run(
        [sys.executable, "-c", STOCK, str(spawn)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert stock.returncode == 0 and "instances" in stock.stdout, stock.stderr[-3000:]


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
