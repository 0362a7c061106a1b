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


def test_spawned_and_torchrun_processes_and_a_stock_student(world: World, tmp_path: Path) -> None:
    """Two processes each way come to the same weights; Detectron2 alone can use them."""
    spawn, torchrun = tmp_path / "spawn", tmp_path / "torchrun"
    # The digits are made while both start: by one of the four processes.
    processes = [
        start(*world.arguments(spawn, "--num-gpus", "--dist-url=auto", *SHORT)),
        start(
            *world.arguments(torchrun, *SHORT),
            module=(
                "-m",
                "torch.distributed.run",
                "--nproc-per-node=2",
                "--master-addr=127.0.0.1",
                f"--master-port={free_port()}",
            ),
        ),
    ]
    outputs = [finish(process) for process in processes]
    # A run that nothing is wrong with prints no warning of libraries about each other.
    noise = ("torch.jit.script", "meshgrid", "TypedStorage", "broadcast_buffers", "USDT")
    assert not [word for word in noise for text in outputs if word in text]
    assert_same(checkpoint(spawn), checkpoint(torchrun))
    assert checkpoint(spawn)["trainer"]["data"]["processes"] == 2

    stock = subprocess.run(
        [sys.executable, "-c", STOCK, str(spawn)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert stock.returncode == 0 and "instances" in stock.stdout, stock.stderr[-3000:]
