#!/usr/bin/env python
"""The demo: a teacher, a student by itself, and the student that learns from the teacher.

Makes the digits data set, trains the three through train_net.py, prints one table, and writes
summary.json and demo.png into the output folder. Everything that the trainings print goes to log
files there.
"""

import argparse
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from detectron2.config import CfgNode  # noqa: E402

from ssim_kd.data import ensure_digits, register_digits  # noqa: E402
from ssim_kd.engine import argument_parser, load_config  # noqa: E402
from ssim_kd.metrics_file import Series  # noqa: E402
from ssim_kd.projects import add_project_configs  # noqa: E402
from tools.demo_training import (  # noqa: E402
    CONFIGS,
    METRICS,
    Console,
    Job,
    StepError,
    Training,
    results_of,
    series_of,
    train,
)

# Overrides of --quick: seconds instead of minutes, and nothing is learned.
QUICK = {
    "SOLVER.MAX_ITER": 4,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "DATASETS.DIGITS.NUM_IMAGES": (16, 4, 8),
}


TRAININGS = (
    Training("teacher", "teacher", "teacher_faster_rcnn_R_50_w8_demo.yaml"),
    Training("student", "plain student", "plain_faster_rcnn_R_50_w4_demo.yaml"),
    Training("distilled", "distilled student", "ssim_faster_rcnn_R_50_w4_demo.yaml"),
)


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    args = parse(argv)
    started, cpu_started = time.monotonic(), cpu_seconds()
    out = Path(args.output).resolve()
    console = Console()
    try:
        out.mkdir(parents=True, exist_ok=True)
        console.step(f"SSIM distillation on handwritten digits, on {describe(args.device)}")
        configs = {t.key: config_of(t, args, out) for t in TRAININGS}
        console.step("[1/4] data")
        make_data(configs["student"])
        # The plain student needs no teacher.
        for number, keys in enumerate([("teacher", "student"), ("distilled",)], start=2):
            jobs = [
                Job(t, configs[t.key], overrides(t, args, out), out / t.key)
                for t in TRAININGS
                if t.key in keys
            ]
            titles = " and ".join(job.training.title for job in jobs)
            console.step(f"[{number}/4] {titles}: {', '.join(str(job.log) for job in jobs)}")
            train(jobs, console, resume=args.resume)
        console.step("[4/4] speed and picture")
        summary = summarise(configs, out)
        from tools.demo_picture import draw_demo

        draw_demo(configs, out / "demo.png", summary)
    except StepError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Add --resume to continue.", file=sys.stderr)
        return 130
    summary["run"] = {
        "seed": args.seed,
        "device": describe(args.device),
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(cpu_seconds() - cpu_started, 1),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{table(summary)}\n\n{out / 'summary.json'}\n{out / 'demo.png'}")
    return 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default=str(ROOT / "output" / "demo"), help="folder of results")
    parser.add_argument("--data", default=str(ROOT / "datasets" / "digits"), help="folder of data")
    parser.add_argument("--seed", type=int, default=1, help="of all three trainings, >= 0")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep finished trainings and continue a stopped one; without it all three "
        "trainings start anew (the data is kept in either case)",
    )
    parser.add_argument("--quick", action="store_true", help="a few iterations: tests the demo")
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}: expected 0 or more")
    return args


def overrides(training: Training, args: argparse.Namespace, out: Path) -> list[str]:
    """KEY VALUE ... for train_net.py."""
    found: dict[str, Any] = {
        "SEED": args.seed,
        "MODEL.DEVICE": args.device,
        "OUTPUT_DIR": out / training.key,
        "DATASETS.DIGITS.ROOT": Path(args.data).resolve(),
        # A GPU is faster than one process draws and reads images.
        "DATALOADER.NUM_WORKERS": 4 if args.device.startswith("cuda") else 1,
    }
    if training.key == "distilled":
        found["MODEL.DISTILL.TEACHER.WEIGHTS"] = out / "teacher" / "model_final.pth"
    if args.quick:
        found |= QUICK
    return [str(x) for pair in found.items() for x in pair]


def config_of(training: Training, args: argparse.Namespace, out: Path) -> CfgNode:
    """The config that train_net.py will see."""
    command = ["--config-file", str(CONFIGS / training.config), *overrides(training, args, out)]
    try:
        return load_config(argument_parser().parse_args(command), add_project_configs)
    except ValueError as error:
        raise StepError(str(error)) from error


def make_data(cfg: CfgNode) -> None:
    """Draw the digits, with a progress bar, unless they are there."""
    register_digits(cfg)
    try:
        ensure_digits(["digits_train", "digits_test"])
    except OSError as error:
        raise StepError(f"The data could not be made: {error}") from error


def summarise(configs: dict[str, CfgNode], out: Path) -> dict[str, dict[str, Any]]:
    """Collect what was measured, and measure parameters and speed."""
    from tools.demo_picture import load_student, load_test_images

    models = {key: load_student(cfg, out / key) for key, cfg in configs.items()}
    images = load_test_images(configs["student"], 30)
    speeds = images_per_second(models, images)
    summary: dict[str, dict[str, Any]] = {}
    for key, model in models.items():
        summary[key] = {
            **{name: round(value, 2) for name, value in (results_of(out / key) or {}).items()},
            "parameters": sum(p.numel() for p in model.parameters()),
            "images_per_second": round(speeds[key], 1),
            "seconds_trained": round(seconds_trained(series_of(out / key)), 1),
        }
    return summary


def seconds_trained(series: Mapping[str, Series]) -> float:
    """Seconds that the iterations took, without start and evaluation; each iteration once.

    Args:
        series: of metrics.json; "time" is the median of the iterations since the value before.
    """
    seconds, previous = 0.0, -1
    for iteration, value in series.get("time", Series()).pairs():
        seconds += value * (iteration - previous)
        previous = iteration
    return seconds


def images_per_second(
    models: Mapping[str, Callable[[list[dict[str, Any]]], Any]], images: list[dict[str, Any]]
) -> dict[str, float]:
    """Images a second, one at a time, from tensors to detections; the median of three rounds.

    The models take turns, so that a machine that is busy now and then treats them alike.
    """
    rounds: dict[str, list[float]] = {key: [] for key in models}
    with torch.no_grad():
        for _ in range(3):
            for key, model in models.items():
                model(images[:1])
                start = time.perf_counter()
                for image in images:
                    model([image])  # its results are read on the host: nothing is left running
                rounds[key].append(len(images) / (time.perf_counter() - start))
    return {key: sorted(values)[len(values) // 2] for key, values in rounds.items()}


def table(summary: dict[str, dict[str, Any]]) -> str:
    """The results as text."""
    lines = [
        f"{'':18}{'AP':>7}{'AP50':>7}{'AP75':>7}{'parameters':>12}{'images/s':>10}{'trained':>9}"
    ]
    for training in TRAININGS:
        row = summary[training.key]
        values = "".join(f"{row[name]:7.1f}" for name in METRICS)
        lines.append(
            f"{training.title:18}{values}{row['parameters'] / 1e6:11.2f}M"
            f"{row['images_per_second']:10.1f}{row['seconds_trained']:8.0f}s"
        )
    gain = summary["distilled"]["AP"] - summary["student"]["AP"]
    meaning = (
        f"Distillation changed the student's AP by {gain:+.1f}, in one run. Other seeds and "
        "machines gave the plain\nstudent 28 to 47 AP and the distilled one 49 to 57. The student "
        "is stopped while it still improves:\nthis shows faster learning, not a better end. "
        "docs/results.md has the study with seeds."
    )
    return "\n".join([*lines, "", meaning])


def cpu_seconds() -> float:
    """Seconds of processor time that this process and its finished children took."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def describe(device: str) -> str:
    """The device in words."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores"


if __name__ == "__main__":
    # A training is then asked to save before this ends, as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
