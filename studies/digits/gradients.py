#!/usr/bin/env python
"""How strong is a loss on maps next to the detection losses? Norms of their gradients.

For each run, a distilled training of ``ssim-kd compare studies/digits.yaml``: with its weights at
the end, on batches of the training set, the norm of the gradient of the detection losses in the
student's backbone, and that of its distillation loss with the weight 1.

    python studies/digits/gradients.py output/compare/short/ssim/t1/1 output/compare/short/l2/t1/1
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.utils.events import EventStorage
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ssim_kd.data import register_digits  # noqa: E402
from ssim_kd.engine import argument_parser, load_config  # noqa: E402
from ssim_kd.projects import add_project_configs  # noqa: E402
from tools.demo_picture import load_distilled  # noqa: E402

DISTILL = "loss_distill"


def main(argv: list[str] | None = None) -> int:
    """Print the medians, as JSON; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders")
    parser.add_argument("--batches", type=int, default=20)
    args = parser.parse_args(argv)
    print(json.dumps({str(run): norms(run, args.batches) for run in args.runs}, indent=1))
    return 0


def norms(run: Path, batches: int) -> dict[str, float]:
    """Medians over batches of the two norms, and the weight that the run had."""
    arguments = ["--config-file", str(run / "config.yaml"), "MODEL.DEVICE", "cpu"]
    cfg = load_config(argument_parser().parse_args(arguments), add_project_configs)
    weight = cfg.MODEL.DISTILL.LOSS_WEIGHT
    cfg.defrost()
    cfg.MODEL.DISTILL.LOSS_WEIGHT = 1.0
    model = load_distilled(cfg, run).train()
    found: dict[str, list[float]] = {"detection": [], "distillation": []}
    torch.manual_seed(0)
    with EventStorage():
        for batch in images(cfg, batches):
            losses = model(batch)
            parts = {
                "distillation": losses[DISTILL],
                "detection": sum(value for key, value in losses.items() if key != DISTILL),
            }
            for name, loss in parts.items():
                found[name].append(gradient_norm(loss, model.student.get_submodule("backbone")))
    return {"weight": weight, **{k: statistics.median(v) for k, v in found.items()}}


def images(cfg: CfgNode, batches: int) -> list[list[dict]]:
    """The first batches of the training set."""
    register_digits(cfg)
    mapper, size = DatasetMapper(cfg, is_train=True), cfg.SOLVER.IMS_PER_BATCH
    records = [mapper(record) for record in DatasetCatalog.get("digits_train")[: batches * size]]
    return [records[i : i + size] for i in range(0, len(records), size)]


def gradient_norm(loss: torch.Tensor, module: nn.Module) -> float:
    """L2 norm of the gradient of a loss in a module's parameters."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5


if __name__ == "__main__":
    sys.exit(main())
