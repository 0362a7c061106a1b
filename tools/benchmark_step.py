#!/usr/bin/env python
"""Times a training step without and with distillation, and shows where the time goes.

The arms share one student and one teacher and take turns, step by step, so that a drift of the
machine's speed meets all of them alike. Weights and images are random: they cost what real ones
do, and nothing is downloaded.

    python tools/benchmark_step.py --device cuda                     # 800 x 1333, two images
    python tools/benchmark_step.py --device cpu                      # a small size
    python tools/benchmark_step.py --arms l2 ssim pkd mgd            # methods of projects/
    python tools/benchmark_step.py --arms vfm --opts MODEL.DISTILL.VFM.WEIGHTS vit.pth
"""

import argparse
import gc
import json
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ssim_kd.config import student_config
from ssim_kd.modeling import DistilledDetector, FrozenTeacher, build_distillers, teacher_source
from tools.benchmarking import (
    PAIRS,
    ROOT,
    Clock,
    environment,
    images,
    method_config,
    shipped_config,
    stand_in,
    summary,
)

#: The stock student, distillation switched off, and by two losses: always timed.
ARMS = ("student", "none", "l2", "ssim")


class TimedTeacher:
    """A teacher whose calls are timed."""

    def __init__(self, teacher: Any, clock: Clock) -> None:
        self.teacher, self.clock = teacher, clock

    def __call__(self, images: Sequence[torch.Tensor]) -> dict[str, Any]:
        """See :class:`LoadedTeacher`."""
        with self.clock("teacher forward"):
            return self.teacher(images)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)


def config(name: str, args: argparse.Namespace, loss: str = "ssim") -> CfgNode:
    """The shipped config of a pair and a loss, with the overrides of the command line."""
    cfg = shipped_config(name, args.device, loss)
    cfg.merge_from_list(args.opts)
    return cfg


def build_arms(name: str, args: argparse.Namespace, arms: tuple[str, ...]) -> dict[str, nn.Module]:
    """Some of the arms of a pair, on one student and, if one needs it, one teacher."""
    cfg = config(name, args)
    student = stand_in(student_config(cfg))
    built: dict[str, nn.Module] = {"student": student, "none": DistilledDetector(student=student)}
    losses = [arm for arm in arms if arm not in built]
    if losses:
        teacher = stand_in(teacher_source(cfg).cfg)
    for loss in losses:
        built[loss] = DistilledDetector(
            student=student,
            # Each arm taps what it needs of the one detector.
            teacher=FrozenTeacher(teacher, **args.teacher),
            distillers=build_distillers(config(name, args, loss)),
        ).to(args.device)
    return {arm: built[arm] for arm in arms}


def arms_of(name: str, args: argparse.Namespace) -> tuple[str, ...]:
    """What is timed of a pair: methods without a config for its detector are left out."""
    asked = [arm for arm in args.arms if arm not in ARMS]
    return (*ARMS, *(arm for arm in asked if method_config(name, arm)))


class Stepper:
    """Takes training steps that change nothing, with a separate model and optimizer."""

    def __init__(self, name: str, args: argparse.Namespace, model: nn.Module, clock: Clock) -> None:
        self.model, self.clock = model, clock
        self.optimizer = build_optimizer(config(name, args), model)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0  # the arms share the student, which shall stay as it is
        self.batch = images(args.images, *args.size)
        self.amp = _amp(args)

    def __call__(self, arm: str) -> None:
        """One step, timed under the arm's name."""
        self.optimizer.zero_grad()
        with self.clock(arm):
            with self.amp:
                losses = self.model.train()(self.batch)
                total = torch.stack(list(losses.values())).sum()
            with self.clock(f"{arm}: backward"):
                total.backward()
            with self.clock(f"{arm}: optimizer"):
                self.optimizer.step()


def _amp(args: argparse.Namespace) -> Any:
    if not args.amp:
        return nullcontext()
    return torch.autocast(args.device, torch.float16 if args.device == "cuda" else torch.bfloat16)


def measure_pair(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Steps of one pair: stock student, distillation by none, l2, ssim and other methods."""
    clock = Clock(args.device, cpu_time=args.cpu_time)
    arms = build_arms(name, args, arms_of(name, args))
    steppers = {arm: Stepper(name, args, model, clock) for arm, model in arms.items()}
    teacher: Any = cast(DistilledDetector, arms["ssim"]).load_teacher()
    batch = steppers["ssim"].batch
    on_device = [x["image"].to(args.device) for x in batch]
    with EventStorage():
        for _ in range(args.warmup + args.steps):
            for arm, step in steppers.items():
                step(arm)
            with clock("teacher forward"):
                teacher(on_device)
    parts = measure_parts(arms["ssim"], batch, args, _amp(args))
    times = {k: summary(v) for k, v in clock.seconds(skip=args.warmup).items()}
    median = {key: value["median_s"] for key, value in times.items()}
    both = median["student"] + median["teacher forward"]
    weights = sum(p.numel() * p.element_size() for p in teacher.backbone.parameters())
    return {
        "times": times,
        "parts_of_ssim_step": parts,
        "student_plus_teacher_s": both,
        "overhead_of_ssim": median["ssim"] / both - 1,
        "overhead_of_l2": median["l2"] / both - 1,
        "teacher_weight_bytes": weights,
    }


def measure_peaks(name: str, args: argparse.Namespace) -> dict[str, int]:
    """The most memory in bytes that each arm's step takes on a GPU, without other arms' objects."""
    peaks = {}
    for arm in arms_of(name, args):
        gc.collect()
        before = torch.cuda.memory_allocated()
        step = Stepper(name, args, build_arms(name, args, (arm,))[arm], Clock(args.device))
        torch.cuda.reset_peak_memory_stats()
        with EventStorage():
            for _ in range(2):  # the second one also holds the momenta
                step(arm)
        peaks[arm] = torch.cuda.max_memory_allocated() - before
        del step
    return peaks


def measure_parts(
    model: Any, batch: list[dict[str, Any]], args: argparse.Namespace, amp: Any
) -> dict[str, Any]:
    """Shares of a step's time: teacher, student's forward, loss, backward."""
    clock = Clock(args.device, cpu_time=args.cpu_time)
    timed = TimedTeacher(model.load_teacher(), clock)
    model.load_teacher = lambda: timed
    hooks = [
        *clock.around(model.student, "student forward"),
        *(hook for d in model.distillers.values() for hook in clock.around(d, "loss forward")),
    ]
    with EventStorage():
        for _ in range(args.warmup + args.steps):
            model.zero_grad()
            with amp:
                losses = model.train()(batch)
                total = torch.stack(list(losses.values())).sum()
            with clock("backward"):
                total.backward()
    del model.load_teacher
    for hook in hooks:
        hook.remove()
    return {k: summary(v) for k, v in clock.seconds(skip=args.warmup).items()}


def report(pairs: dict[str, Any]) -> None:
    """Print the figures as tables."""
    for name, pair in pairs.items():
        print(f"\n{name}")
        base = pair["times"]["student"]["median_s"]
        for key, value in pair["times"].items():
            if ":" not in key:
                peak = pair["peak_bytes"].get(key)
                memory = f"  peak {peak / 2**20:8.0f} MiB" if peak else ""
                ratio = value["median_s"] / base
                print(f"  {key:18s}{value['median_s'] * 1e3:10.1f} ms  x{ratio:5.2f}{memory}")
        for key, value in pair["parts_of_ssim_step"].items():
            print(f"    of ssim: {key:18s}{value['median_s'] * 1e3:10.1f} ms")
        print(f"  ssim over student + teacher: {pair['overhead_of_ssim']:+.1%}", end="")
        print(f"   (l2: {pair['overhead_of_l2']:+.1%})")


def parser(description: str | None, output: str) -> argparse.ArgumentParser:
    """The command line of this benchmark and of the teacher's."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    made.add_argument("--images", type=int, help="in a batch")
    made.add_argument("--steps", type=int)
    made.add_argument("--warmup", type=int, default=2)
    made.add_argument(
        "--cpu-time", action="store_true", help="the processor's seconds: for a shared machine"
    )
    made.add_argument("--amp", action="store_true", help="mixed precision")
    made.add_argument(
        "--arms", nargs="+", default=[], help="methods of projects/, next to the losses"
    )
    made.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    made.add_argument("--output", type=Path, default=ROOT / "output" / output)
    return made


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on the device."""
    on_gpu = args.device == "cuda"
    args.size = args.size or ((800, 1333) if on_gpu else (160, 256))
    args.images = args.images or (2 if on_gpu else 1)
    args.steps = args.steps or (15 if on_gpu else 5)
    half = {"dtype": torch.float16, "channels_last": True} if args.amp and on_gpu else {}
    args.teacher = {"fold_bn": True, **half}
    return args


def main() -> None:
    """Measure, print, write."""
    made = parser(__doc__, "benchmark_step.json")
    made.add_argument("--opts", nargs="+", default=[], help="overrides of every config")
    args = settle(made.parse_args())
    results: dict[str, Any] = {
        "environment": environment(torch.device(args.device)),
        **{
            key: getattr(args, key)
            for key in ("size", "images", "steps", "amp", "cpu_time", "opts")
        },
        "pairs": {name: measure_pair(name, args) for name in args.pairs},
    }
    for name, pair in results["pairs"].items():
        pair["peak_bytes"] = measure_peaks(name, args) if args.device == "cuda" else {}
    report(results["pairs"])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1))
    print(f"\nWritten to {args.output}")
    if any(math.isnan(pair["overhead_of_ssim"]) for pair in results["pairs"].values()):
        raise SystemExit("A figure is not a number.")


if __name__ == "__main__":
    main()
