#!/usr/bin/env python
"""Times the teacher's forward under each option, and shows how far its features move.

python tools/benchmark_teacher.py --device cuda                  # 800 x 1333, two images
python tools/benchmark_teacher.py --device cpu                   # a small size
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import build_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ssim_kd.modeling import FrozenTeacher, teacher_source
from tools.benchmark_step import parser, settle
from tools.benchmarking import PAIRS, Clock, environment, images, shipped_config, stand_in, summary

FOLDED = {"fold_bn": True}
LAST = {"fold_bn": True, "channels_last": True}
# The first is what the others are compared with: Detectron2's own forward, eager, in float32.
TEACHERS: dict[str, dict[str, Any]] = {
    "stock float32": {},
    "folded": FOLDED,
    "folded, channels last": LAST,
    "folded, bfloat16, channels last": {**LAST, "dtype": torch.bfloat16},
    "folded, float16, channels last": {**LAST, "dtype": torch.float16},
    "folded, float16, channels last, compiled": {**LAST, "dtype": torch.float16, "compiled": True},
}


def measure(name: str, args: argparse.Namespace, *, compiled: bool) -> dict[str, Any]:
    """The teacher's forward by option: time, and how far its features move."""
    cfg = shipped_config(name, args.device)
    model = stand_in(teacher_source(cfg).cfg)
    state = model.state_dict()
    on_device = [x["image"].to(args.device) for x in images(args.images, *args.size)]
    teachers = {}
    for option, kwargs in TEACHERS.items():
        slow_on_cpu = kwargs.get("compiled") or "dtype" in kwargs  # emulated there
        # Compiling takes a minute a model: one shows what it gives.
        if (args.device == "cpu" and slow_on_cpu) or (kwargs.get("compiled") and not compiled):
            continue
        copy = build_model(teacher_source(cfg).cfg)
        copy.load_state_dict(state)
        teachers[option] = FrozenTeacher(copy, **kwargs).load().to(args.device)
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


def main() -> None:
    """Measure, print, write."""
    arguments = parser(__doc__, "benchmark_teacher.json")
    arguments.set_defaults(pairs=list(PAIRS)[:2])  # the third one's teacher is the first one's
    args = settle(arguments.parse_args())
    rows = {name: measure(name, args, compiled=i == 0) for i, name in enumerate(args.pairs)}
    for name, options in rows.items():
        print(f"\nTeacher of {name}")
        for option, row in options.items():
            print(
                f"  {option:42s}{row['median_s'] * 1e3:10.1f} ms  x{row['speed_up']:5.2f}"
                f"  features change by {row['relative_change']:.1e}"
            )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    found = {"environment": environment(torch.device(args.device)), "teachers": rows}
    args.output.write_text(json.dumps(found, indent=1))
    print(f"\nWritten to {args.output}")


if __name__ == "__main__":
    main()
