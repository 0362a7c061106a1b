#!/usr/bin/env python
"""Times a training step without and with distillation, and shows where the time goes.

The arms share one student and one teacher and take turns, step by step, so that a drift of the
machine's speed meets all of them alike. Weights and images are random: they cost what real ones
do, and nothing is downloaded.

    python tools/benchmark_step.py --device cuda                     # 800 x 1333, two images
    python tools/benchmark_step.py --device cpu                      # a small size
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils.hooks import RemovableHandle

from ssim_kd.config import add_distill_config, student_config
from ssim_kd.modeling import DistilledDetector, FrozenTeacher, teacher_config
from ssim_kd.modeling.distiller import build_distiller

ROOT = Path(__file__).resolve().parent.parent
PAIRS = {
    "Faster R-CNN R50 <- R101": "ssim_faster_rcnn_R_50_FPN_1x_from_R_101.yaml",
    "Faster R-CNN R50 <- X101": "ssim_faster_rcnn_R_50_FPN_1x.yaml",
    "RetinaNet R50 <- R101": "ssim_retinanet_R_50_FPN_1x.yaml",
}
# What the teacher's forward is compared with: Detectron2's own, eager, in float32.
STOCK = {"fold_bn": False}
TEACHERS: dict[str, dict[str, Any]] = {
    "stock float32": STOCK,
    "folded": {},
    "folded, channels last": {"channels_last": True},
    "folded, bfloat16, channels last": {"dtype": torch.bfloat16, "channels_last": True},
    "folded, float16, channels last": {"dtype": torch.float16, "channels_last": True},
    "folded, float16, channels last, compiled": {
        "dtype": torch.float16,
        "channels_last": True,
        "compiled": True,
    },
}


def config(name: str, device: str, loss: str = "ssim") -> CfgNode:
    """A shipped COCO config on a device."""
    cfg = get_cfg()
    add_distill_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "COCO-Detection" / name))
    cfg.MODEL.DEVICE = device
    cfg.MODEL.DISTILL.LOSS = loss
    return cfg


def stand_in(cfg: CfgNode) -> Any:
    """A detector with random weights whose features stay of the size that trained ones have."""
    model = build_model(cfg)
    for block in model.modules():
        if isinstance(block, BottleneckBlock):
            block.conv3.norm.weight.data.fill_(0.2)
    return model


def images(count: int, height: int, width: int) -> list[dict[str, Any]]:
    """A batch of noise with eight boxes an image."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(count):
        corner = torch.rand(8, 2, generator=generator) * torch.tensor([width * 0.7, height * 0.7])
        side = torch.rand(8, 2, generator=generator) * torch.tensor([width * 0.25, height * 0.25])
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + side + 4], dim=1))
        instances.gt_classes = torch.randint(0, 80, (8,), generator=generator)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


class Clock:
    """Seconds of a block: by events on a GPU, read after the run; by the host's clock elsewhere."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")
        self._spans: dict[str, list[Any]] = defaultdict(list)

    def around(self, module: nn.Module | None, name: str) -> list[RemovableHandle]:
        """Time every forward of a module, until the hooks are removed."""
        assert module is not None
        starts: list[Any] = []
        return [
            module.register_forward_pre_hook(lambda *_: starts.append(self._now())),
            module.register_forward_hook(
                lambda *_: self._spans[name].append((starts.pop(), self._now()))
            ),
        ]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a block under a name."""
        start = self._now()
        yield
        self._spans[name].append((start, self._now()))

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, *, skip: int) -> dict[str, list[float]]:
        """The spans by name, without the first ones."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return {
            name: [a.elapsed_time(b) / 1000 if self.on_gpu else b - a for a, b in spans[skip:]]
            for name, spans in self._spans.items()
        }


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {"median_s": quartiles[1], "q1_s": quartiles[0], "q3_s": quartiles[2]}


def timed(function: Callable, clock: Clock, name: str) -> Callable:
    """The function, timed at every call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with clock(name):
            return function(*args, **kwargs)

    return call


def measure_pair(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Steps of one pair: stock student, and distillation by none, l2 and ssim."""
    cfg = config(PAIRS[name], args.device)
    student = stand_in(student_config(cfg))
    teacher = FrozenTeacher(stand_in(teacher_config(cfg)), **args.teacher).to(
        torch.device(args.device)
    )
    arms: dict[str, nn.Module] = {
        "student": student,
        "none": DistilledDetector(student=student),
    }
    for loss in ("l2", "ssim"):
        distiller = build_distiller(config(PAIRS[name], args.device, loss), student, teacher)
        arms[loss] = DistilledDetector(
            student=student, teacher=teacher, distiller=distiller.to(args.device)
        )
    optimizers = {arm: build_optimizer(cfg, model) for arm, model in arms.items()}
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # the arms share the student, which shall stay as it is
    batch = images(args.images, *args.size)
    clock = Clock(args.device)
    peaks: dict[str, int] = {}
    amp = (
        torch.autocast(args.device, torch.float16 if args.device == "cuda" else torch.bfloat16)
        if args.amp
        else nullcontext()
    )

    def step(arm: str) -> None:
        if clock.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        optimizers[arm].zero_grad()
        with clock(arm):
            with amp:
                losses = arms[arm].train()(batch)
                total = torch.stack(list(losses.values())).sum()
            with clock(f"{arm}: backward"):
                total.backward()
            with clock(f"{arm}: optimizer"):
                optimizers[arm].step()
        if clock.on_gpu:
            torch.cuda.synchronize()
            peaks[arm] = torch.cuda.max_memory_allocated()

    on_device = [x["image"].to(args.device) for x in batch]
    with EventStorage():
        for _ in range(args.warmup + args.steps):
            for arm in arms:
                step(arm)
            with clock("teacher forward"):
                teacher(on_device)
    parts = measure_parts(arms["ssim"], batch, args, amp)
    times = {k: summary(v) for k, v in clock.seconds(skip=args.warmup).items()}
    median = {key: value["median_s"] for key, value in times.items()}
    weights = sum(p.numel() * p.element_size() for p in teacher.backbone.parameters())
    return {
        "times": times,
        "parts_of_ssim_step": parts,
        "student_plus_teacher_s": median["student"] + median["teacher forward"],
        "overhead_of_ssim": median["ssim"] / (median["student"] + median["teacher forward"]) - 1,
        "overhead_of_l2": median["l2"] / (median["student"] + median["teacher forward"]) - 1,
        "peak_bytes": peaks,
        "teacher_weight_bytes": weights,
    }


def measure_parts(
    model: Any, batch: list[dict[str, Any]], args: argparse.Namespace, amp: Any
) -> dict[str, Any]:
    """Where the time of a step goes: teacher, student's forward, loss, backward of all."""
    clock = Clock(args.device)
    teacher = model.teacher
    model.teacher = timed(teacher, clock, "teacher forward")
    hooks = [
        *clock.around(model.student, "student forward"),
        *clock.around(model.distiller, "loss forward"),
    ]
    with EventStorage():
        for _ in range(args.warmup + args.steps):
            model.zero_grad()
            with amp:
                losses = model.train()(batch)
                total = torch.stack(list(losses.values())).sum()
            with clock("backward"):
                total.backward()
    model.teacher = teacher
    for hook in hooks:
        hook.remove()
    return {k: summary(v) for k, v in clock.seconds(skip=args.warmup).items()}


def measure_teachers(name: str, args: argparse.Namespace, *, first: bool) -> dict[str, Any]:
    """The teacher's forward by option: time, and how far its features move."""
    cfg = config(PAIRS[name], args.device)
    model = stand_in(teacher_config(cfg))
    state = model.state_dict()
    on_device = [x["image"].to(args.device) for x in images(args.images, *args.size)]
    teachers = {}
    for option, kwargs in TEACHERS.items():
        slow_on_cpu = kwargs.get("compiled") or "dtype" in kwargs  # emulated there
        # Compiling takes a minute a model: one shows what it gives.
        if (args.device == "cpu" and slow_on_cpu) or (kwargs.get("compiled") and not first):
            continue
        copy = build_model(teacher_config(cfg))
        copy.load_state_dict(state)
        teachers[option] = FrozenTeacher(copy, **kwargs).to(torch.device(args.device))
        teachers[option].tap(list(model.backbone.output_shape()))
    reference = {k: v.double() for k, v in teachers["stock float32"](on_device).items()}
    clock = Clock(args.device)
    for _ in range(args.warmup + args.steps):
        for option, teacher in teachers.items():
            with clock(option):
                teacher(on_device)
    seconds = {k: summary(v) for k, v in clock.seconds(skip=args.warmup).items()}
    rows = {}
    for option, teacher in teachers.items():
        features = teacher(on_device)
        change = max(
            float((features[k].double() - v).norm() / v.norm()) for k, v in reference.items()
        )
        speed = seconds["stock float32"]["median_s"] / seconds[option]["median_s"]
        rows[option] = {**seconds[option], "speed_up": speed, "relative_change": change}
    return rows


def report(results: dict[str, Any]) -> None:
    """Print the figures as tables."""
    for name, pair in results["pairs"].items():
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
    for name, rows in results["teachers"].items():
        print(f"\nTeacher of {name}")
        for option, row in rows.items():
            print(
                f"  {option:42s}{row['median_s'] * 1e3:10.1f} ms  x{row['speed_up']:5.2f}"
                f"  features change by {row['relative_change']:.1e}"
            )


def commit() -> str:
    """The commit that was measured; "unknown" outside a checkout."""
    try:
        return subprocess.check_output(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--images", type=int, help="in a batch")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "benchmark_step.json")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.size = args.size or ((800, 1333) if on_gpu else (160, 256))
    args.images = args.images or (2 if on_gpu else 1)
    args.steps = args.steps or (15 if on_gpu else 5)
    args.teacher = {"dtype": torch.float16, "channels_last": True} if args.amp and on_gpu else {}
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
        "commit": commit(),
        "size": list(args.size),
        "images": args.images,
        "steps": args.steps,
        "amp": args.amp,
        "pairs": {name: measure_pair(name, args) for name in args.pairs},
        "teachers": {
            name: measure_teachers(name, args, first=i == 0)
            for i, name in enumerate(args.pairs[:2])
        },
    }
    report(results)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1))
    print(f"\nWritten to {args.output}")
    if any(math.isnan(pair["overhead_of_ssim"]) for pair in results["pairs"].values()):
        raise SystemExit("A figure is not a number.")


if __name__ == "__main__":
    main()
