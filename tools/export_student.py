#!/usr/bin/env python
"""Export a trained student: stock config and weights, TorchScript, ONNX, 8-bit ONNX.

    python tools/export_student.py --config-file output/distilled/config.yaml \\
        --output output/export MODEL.WEIGHTS output/distilled/model_final.pth

writes student.yaml, model.pth, model.ts, model.onnx and export.json, which says how far the
exported models' detections are from PyTorch's on images of DATASETS.TEST. `--formats int8` adds
model_int8.onnx, calibrated on images of DATASETS.TRAIN; `--evaluate` the AP of each. A detector of
any stock config is exported as well.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import inference_on_dataset
from detectron2.utils.logger import setup_logger
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ssim_kd.config import write_stock_config
from ssim_kd.config_files import merge_file
from ssim_kd.data import register_datasets
from ssim_kd.engine.defaults import load_config
from ssim_kd.engine.evaluation import build_evaluator, student_for_evaluation
from ssim_kd.projects import add_project_configs
from tools.exporting import (
    ExportedDetector,
    ExportError,
    agreement,
    export_onnx,
    export_torchscript,
    output_names,
    quantize,
    raw_detections,
    tracing_adapter,
)

FILES = {"torchscript": "model.ts", "onnx": "model.onnx", "int8": "model_int8.onnx"}
FORMATS = ("stock", *FILES)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ``argv`` is that of the process unless given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="of the training, or a stock one")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS[:3])
    parser.add_argument("--batch", type=int, default=1, help="images that the model takes at once")
    parser.add_argument(
        "--compare", type=int, default=16, help="images of DATASETS.TEST to compare on; 0: none"
    )
    parser.add_argument(
        "--calibrate", type=int, default=64, help="images of DATASETS.TRAIN for int8"
    )
    parser.add_argument("--evaluate", action="store_true", help="AP of each on DATASETS.TEST")
    parser.add_argument("opts", nargs="*", help="overrides, KEY VALUE: MODEL.WEIGHTS model.pth")
    args = parser.parse_args(argv)
    args.eval_only = True  # for load_config: nothing is trained
    args.outputs = []
    if args.batch < 1 or (args.batch > 1 and ("int8" in args.formats or args.evaluate)):
        parser.error(
            f"--batch is {args.batch}; expected 1 or more, and 1 with int8 and --evaluate."
        )
    return args


def test_images(cfg: CfgNode, name: str, count: int) -> Iterator[dict[str, Any]]:
    """The first images of a data set as they are evaluated, without annotations."""
    for batch in islice(build_detection_test_loader(cfg, name), count):
        yield {**batch[0], "image": batch[0]["image"].float()}


def export(args: argparse.Namespace, cfg: CfgNode, model: nn.Module) -> dict[str, ExportedDetector]:
    """Write the formats that were asked for.

    Returns:
        the exported models that run, by format. One that cannot be exported is missing.
    """
    exported: dict[str, ExportedDetector] = {}
    if "stock" in args.formats:
        weights = args.output / "model.pth"
        torch.save({"model": model.state_dict()}, weights)
        stock = cfg.clone()
        stock.defrost()
        stock.MODEL.WEIGHTS, stock.MODEL.DEVICE = str(weights), args.device
        write_stock_config(stock, str(args.output / "student.yaml"))
    if set(args.formats) <= {"stock"}:
        return exported
    side = cfg.INPUT.MIN_SIZE_TEST or 640
    # Two sizes, so that nothing that depends on one of them becomes a constant of a batch.
    sizes = [(side, side * 4 // 3 // (1 + i % 2)) for i in range(args.batch)]
    adapter = tracing_adapter(model, sizes)
    args.outputs = output_names(adapter)
    path = {name: args.output / file for name, file in FILES.items()}
    if "torchscript" in args.formats:
        export_torchscript(adapter, path["torchscript"])
        exported["torchscript"] = ExportedDetector.torchscript(path["torchscript"], args.outputs)
    if {"onnx", "int8"} & set(args.formats):
        export_onnx(adapter, path["onnx"])
        exported["onnx"] = ExportedDetector.onnx(path["onnx"])
    if "int8" in args.formats:
        quantize(path["onnx"], path["int8"], calibration_images(cfg, args.calibrate))
        exported["int8"] = ExportedDetector.onnx(path["int8"])
    return exported


def calibration_images(cfg: CfgNode, count: int) -> Iterator[np.ndarray]:
    """Images of DATASETS.TRAIN as arrays, at the size of evaluation."""
    if not cfg.DATASETS.TRAIN:
        raise ExportError("DATASETS.TRAIN is (); expected a data set to calibrate int8 on.")
    for x in test_images(cfg, cfg.DATASETS.TRAIN[0], count):
        yield x["image"].numpy()


@torch.no_grad()
def compare(
    cfg: CfgNode, model: nn.Module, exported: dict[str, ExportedDetector], args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """How far each exported model's detections are from PyTorch's; see :func:`agreement`."""
    inputs = list(test_images(cfg, cfg.DATASETS.TEST[0], args.compare))
    count = args.batch
    batches = [inputs[i : i + count] for i in range(0, len(inputs) - count + 1, count)]
    expected = [found for batch in batches for found in raw_detections(model, batch)]
    return {
        name: agreement([d for batch in batches for d in detector.raw(batch)], expected)
        for name, detector in exported.items()
    }


def average_precision(cfg: CfgNode, detector: nn.Module) -> float:
    """Box AP on the first set of DATASETS.TEST."""
    name = cfg.DATASETS.TEST[0]
    evaluator = build_evaluator(cfg, name)
    results = inference_on_dataset(detector, build_detection_test_loader(cfg, name), evaluator)
    return float(results["bbox"]["AP"])


def main(argv: Sequence[str] | None = None) -> None:
    """Export, compare, evaluate, print, write."""
    args = parse(argv)
    setup_logger()
    as_written = get_cfg()
    as_written.set_new_allowed(True)
    merge_file(as_written, args.config_file)
    args.device = as_written.MODEL.DEVICE
    args.opts = [*args.opts, "MODEL.DEVICE", "cpu"]  # what is traced runs on a CPU
    cfg = load_config(args, add_project_configs)
    args.output.mkdir(parents=True, exist_ok=True)
    full, (cfg, model) = cfg, student_for_evaluation(cfg, resume=False)
    model.eval()
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(args.output)
    if args.compare or args.evaluate or "int8" in args.formats:
        register_datasets(full)
    exported = export(args, cfg, model)
    found: dict[str, Any] = {
        "formats": list(args.formats),
        "batch": args.batch,
        "outputs": args.outputs,
    }
    if args.compare and exported:
        found["agreement"] = compare(cfg, model, exported, args)
    if args.evaluate:
        detectors = {"pytorch": model, **exported}
        found["AP"] = {name: average_precision(cfg, d) for name, d in detectors.items()}
    report(found)
    (args.output / "export.json").write_text(json.dumps(found, indent=1))
    print(f"Written to {args.output}")


def report(found: dict[str, Any]) -> None:
    """Print the figures, a line each."""
    for name, row in found.get("agreement", {}).items():
        print(
            f"{name:12s} {row['matched']} of {row['expected']} detections match, {row['beside']} "
            f"beside; boxes differ by {row['pixels']:.2g} pixels, scores by {row['score']:.2g}"
        )
    for name, value in found.get("AP", {}).items():
        print(f"{name:12s} {value:.2f} AP")


if __name__ == "__main__":
    try:
        main()
    except ExportError as error:
        raise SystemExit(f"export_student.py: {error}") from None
