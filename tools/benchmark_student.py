#!/usr/bin/env python
"""Size and speed of a student: parameters, FLOPs, images a second; next to its teacher's.

    python tools/benchmark_student.py --config-file output/distilled/config.yaml \\
        --exported output/export MODEL.WEIGHTS output/distilled/model_final.pth

times the student, the teacher that its config names, and what ssim-kd export wrote into
`--exported`, in turns, on images of DATASETS.TEST, one at a time. The time is that of the model:
resizing the image and post-processing masks are not in it. MODEL.DISTILL.TEACHER.NAME ""
leaves the teacher out. Without a GPU, times are those of the
CPU with torch's number of threads (OMP_NUM_THREADS).
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.data import build_detection_test_loader
from detectron2.utils.analysis import FlopCountAnalysis
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ssim_kd.data import register_datasets
from ssim_kd.engine import load_config
from ssim_kd.engine.evaluation import student_for_evaluation, teacher_for_evaluation
from ssim_kd.export import FILES, ExportedDetector, first_images, raw_detections
from ssim_kd.modeling import teacher_name
from ssim_kd.projects import add_project_configs
from tools.benchmarking import Clock, environment, summary


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ``argv`` is that of the process unless given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="of the training, or a stock one")
    parser.add_argument("--exported", type=Path, help="folder of ssim-kd export")
    parser.add_argument("--images", type=int, default=20, help="images of DATASETS.TEST")
    parser.add_argument("--warmup", type=int, default=3, help="images that are not timed")
    parser.add_argument("--output", type=Path, default=Path("output/benchmark_student.json"))
    parser.add_argument("opts", nargs="*", help="overrides, KEY VALUE: MODEL.WEIGHTS model.pth")
    args = parser.parse_args(argv)
    args.eval_only = True  # for load_config: nothing is trained
    return args


def flops(model: nn.Module, image: dict[str, Any]) -> float:
    """Multiply-adds of a forward on an image, as fvcore counts them."""
    inputs = [{"image": image["image"]}]
    counted = FlopCountAnalysis(model, inputs)
    counted.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return float(counted.total())


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    args = parse(argv)
    cfg = load_config(args, add_project_configs)
    register_datasets(cfg)
    student_cfg, student = student_for_evaluation(cfg, resume=False)
    models: dict[str, nn.Module] = {"student": student}
    if teacher_name(cfg):
        models["teacher"] = teacher_for_evaluation(cfg)[1]
    loader = build_detection_test_loader(student_cfg, cfg.DATASETS.TEST[0])
    images = list(first_images(loader, args.warmup + args.images))
    rows: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        rows[name] = {
            "parameters": sum(p.numel() for p in model.eval().parameters()),
            "flops": flops(model, images[0]),
        }
    runs: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
        name: partial(raw_detections, model) for name, model in models.items()
    }
    runs |= {f"student, {k}": detector.raw for k, detector in exported(args).items()}
    clock = Clock(cfg.MODEL.DEVICE)
    with torch.no_grad():
        for image in images:
            for name, run in runs.items():
                with clock(name):
                    run([image])
    for name, seconds in clock.seconds(skip=args.warmup).items():
        row = rows.setdefault(name, {})
        row |= summary(seconds)
        row["images_per_s"] = 1 / row["median_s"]
    size = list(images[0]["image"].shape[-2:])
    found = {"environment": environment(torch.device(cfg.MODEL.DEVICE)), "size": size, "rows": rows}
    report(found)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=1))
    print(f"Written to {args.output}")


def exported(args: argparse.Namespace) -> dict[str, ExportedDetector]:
    """The models in the folder ``--exported``, by format."""
    if args.exported is None:
        return {}
    found = {}
    files = {name: args.exported / file for name, file in FILES.items()}
    if not any(path.is_file() for path in files.values()):
        raise SystemExit(f"--exported {args.exported} holds none of {list(FILES.values())}.")
    if files["torchscript"].is_file():
        names = json.loads((args.exported / "export.json").read_text())["outputs"]
        found["torchscript"] = ExportedDetector.torchscript(files["torchscript"], names)
    for name in ("onnx", "int8"):
        if files[name].is_file():
            threads = torch.get_num_threads()
            found[name] = ExportedDetector.onnx(files[name], threads=threads)
    return found


def report(found: dict[str, Any]) -> None:
    """Print the figures as a table."""
    env = found["environment"]
    print(f"{env['device']}, {env['threads']} thread(s), an image of {found['size']} pixels")
    print(f"{'':22s}{'parameters':>12s}{'GFLOPs':>10s}{'ms':>10s}{'images/s':>10s}")
    for name, row in found["rows"].items():
        size = f"{row['parameters'] / 1e6:10.2f} M" if "parameters" in row else f"{'':12s}"
        work = f"{row['flops'] / 1e9:10.2f}" if "flops" in row else f"{'':10s}"
        time = f"{row['median_s'] * 1e3:10.1f}{row['images_per_s']:10.1f}"
        print(f"{name:22s}{size}{work}{time}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"benchmark_student.py: {error}") from None
