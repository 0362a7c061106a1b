"""The benchmarks run, and write the figures that they print; what the figures are is theirs."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from tests.helpers import small_opts
from tools import benchmark_step, benchmark_teacher, benchmarking

ROOT = Path(__file__).resolve().parent.parent
PAIR = "Faster R-CNN R50 <- R101"
SMALL = ("--size", "64", "96", "--steps", "2", "--warmup", "1", "--pairs", PAIR)
# MGD takes other levels than the losses; RetinaNet's BCKD has no config for this pair.
METHODS = ("--arms", "mgd", "bckd", "--cpu-time")


@pytest.fixture
def small(monkeypatch) -> None:
    """Detectors of a tenth of a second, under the shipped configs' names."""
    shipped = benchmarking.shipped_config

    def config(name: str, device: str, loss: str = "ssim"):
        cfg = shipped(name, device, loss)
        cfg.merge_from_list([*small_opts(), "MODEL.ROI_HEADS.NUM_CLASSES", 80])
        cfg.MODEL.DISTILL.TEACHER.OPTS = small_opts(fpn=48)
        return cfg

    for module in (benchmark_step, benchmark_teacher):
        monkeypatch.setattr(module, "shipped_config", config)


def run(module, output: Path, monkeypatch, *options: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["benchmark", *SMALL, *options, "--output", str(output)])
    module.main()
    return json.loads(output.read_text())


def test_the_step(small, tmp_path: Path, monkeypatch, capsys) -> None:
    found = run(benchmark_step, tmp_path / "step.json", monkeypatch, *METHODS)
    pair = found["pairs"][PAIR]
    assert pair["times"]["mgd"]["median_s"] > 0 and "bckd" not in pair["times"]
    assert all(pair["times"][arm]["median_s"] > 0 for arm in benchmark_step.ARMS)
    assert pair["parts_of_ssim_step"].keys() >= {"teacher forward", "loss forward", "backward"}
    assert found["environment"]["versions"]["torch"] and found["size"] == [64, 96]
    assert "ssim over student + teacher" in capsys.readouterr().out


def test_config_takes_overrides() -> None:
    args = Namespace(device="cpu", opts=["MODEL.DISTILL.VFM.WEIGHTS", "vit.pth"])
    cfg = benchmark_step.config(PAIR, args, "vfm")
    assert cfg.MODEL.DISTILL.NAME == "VFMDistiller"
    assert cfg.MODEL.DISTILL.VFM.WEIGHTS == "vit.pth"


def test_the_teacher(small, tmp_path: Path, monkeypatch) -> None:
    options = run(benchmark_teacher, tmp_path / "teacher.json", monkeypatch)["teachers"][PAIR]
    assert options["stock float32"]["relative_change"] == 0
    assert 0 < options["folded"]["relative_change"] < 1e-4
    assert options["folded"]["speed_up"] > 0


def test_the_losses(tmp_path: Path) -> None:
    """In a separate process: it changes how memory is allocated."""
    script = ROOT / "tools" / "benchmark_losses.py"
    command = [sys.executable, str(script), "--device", "cpu", "--quick", "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    found = json.loads((tmp_path / "benchmark_losses.json").read_text())
    (row,) = (r for r in found["times"] if r["level"] == "p4")
    assert {"ours", "ours, min-max", "kornia", "MSE"} <= row["ms"].keys()
    assert all(ms["median"] > 0 for ms in row["ms"].values())
    memory = {r["loss"]: r for r in found["memory"]}
    assert memory["ours"]["saved"] == 1 and memory["ours"]["peak"] < 2.1
    errors = {(r["kind"], r["loss"]): r["gradient"] for r in found["accuracy"]}
    assert errors["near-constant", "ours"] < 1e-6
    assert (tmp_path / "benchmark_losses.png").exists()
    assert "| p4, N=2, 8 ch, fp32 |" in (tmp_path / "benchmark_losses.md").read_text()
