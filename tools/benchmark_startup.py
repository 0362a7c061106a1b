#!/usr/bin/env python3
"""Time a training from its start to the end of the first step, next to stock Detectron2.

Makes synthetic sets in COCO's format and prints CPU seconds and the largest memory, of all
processes together, for Detectron2's DefaultTrainer and for this package, checks included.
The runs alternate; the smallest of each is shown.

    $ python tools/benchmark_startup.py --images 20000
    $ python tools/benchmark_startup.py --images 118287 --objects 7 --polygons --repeats 1
    $ python tools/benchmark_startup.py --images 20000 --processes 8
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

_SIZES = ((640, 480), (480, 640))
_STEP = ["SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()"]
# Written after the last step, which is the first one here.
_NO_REPORT = ["TEST.REPORT", "False"]
_MODEL = """
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  DEVICE: cpu
  WEIGHTS: ""
  BACKBONE: {NAME: build_resnet_fpn_backbone}
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, OUT_FEATURES: [res2, res3, res4, res5]}
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 32}
  ANCHOR_GENERATOR: {SIZES: [[32], [64], [128], [256], [512]]}
  RPN: {IN_FEATURES: [p2, p3, p4, p5, p6]}
  ROI_HEADS: {NAME: StandardROIHeads, IN_FEATURES: [p2, p3, p4, p5]}
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 1, FC_DIM: 64, POOLER_RESOLUTION: 7}
INPUT: {MIN_SIZE_TRAIN: [96]}
DATALOADER: {NUM_WORKERS: 0}
VERSION: 2
"""
# Run as a separate program that imports only Detectron2.
_STOCK = """
import sys, torch
from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, defaults
from detectron2.utils import comm

def wrapped(model, **_):  # Detectron2's own gives DDP the number of a GPU
    ddp = torch.nn.parallel.DistributedDataParallel
    return ddp(model, broadcast_buffers=False) if comm.get_world_size() > 1 else model

defaults.create_ddp_model = wrapped

def main(args):
    folder = args.config_file.rsplit("/", 1)[0]
    register_coco_instances("set", {}, f"{folder}/train.json", f"{folder}/images")
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("set",), ()
    default_setup(cfg, args)
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()

if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    if args.num_gpus > 1:
        from ssim_kd.engine.launch import launch_processes
        launch_processes(main, args, device="cpu", main_args=(args,))
    else:
        main(args)
"""


def write_set(folder: Path, images: int, objects: int, *, polygons: bool, classes: int = 80) -> int:
    """Write a set of random boxes, and links to two pictures. Returns its size in bytes."""
    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number, size in enumerate(_SIZES):
        Image.fromarray(draw.integers(0, 256, (*size[::-1], 3), np.uint8)).save(
            folder / f"{number}.jpg"
        )
    for number in range(images):
        os.symlink(folder / f"{number % 2}.jpg", folder / f"images/{number:012d}.jpg")
    path = folder / "train.json"
    with path.open("w") as file:
        file.write('{"info": {"year": 2017}, "images": [')
        for number in range(images):
            width, height = _SIZES[number % 2]
            file.write(
                f'{", " if number else ""}{{"license": 4, "file_name": "{number:012d}.jpg", '
                f'"coco_url": "http://images.example.org/train/{number:012d}.jpg", "height": '
                f'{height}, "width": {width}, "date_captured": "2013-11-14 16:28:13", "id": '
                f"{number + 1}}}"
            )
        file.write('], "annotations": [')
        for first in range(0, images * objects, 10000):
            rows = _annotations(draw, first, min(10000, images * objects - first), images, classes)
            file.write((", " if first else "") + ", ".join(rows(polygons)))
        names = ", ".join(f'{{"id": {i + 1}, "name": "class{i}"}}' for i in range(classes))
        file.write(f'], "categories": [{names}]}}')
    return path.stat().st_size


def _annotations(
    draw: np.random.Generator, first: int, count: int, images: int, classes: int
) -> Callable[[bool], list[str]]:
    owner = draw.integers(0, images, count)
    size = np.array(_SIZES)[owner % 2]
    side = draw.uniform(0.05, 0.5, (count, 2)) * size
    boxes = np.round(np.hstack([draw.uniform(0, 1, (count, 2)) * (size - side), side]), 2)
    kinds = draw.integers(1, classes + 1, count)

    def rows(polygons: bool) -> list[str]:
        found = []
        for i, (x, y, w, h) in enumerate(boxes.tolist()):
            mask = ""
            if polygons:
                points = draw.uniform(0, 1, (draw.integers(8, 38), 2)) * [w, h] + [x, y]
                mask = f'"segmentation": [{np.round(points, 2).ravel().tolist()}], '
            found.append(
                f'{{{mask}"area": {w * h:.4f}, "iscrowd": 0, "image_id": {owner[i] + 1}, "bbox": '
                f'[{x}, {y}, {w}, {h}], "category_id": {kinds[i]}, "id": {first + i + 1}}}'
            )
        return found

    return rows


def measure(command: list[str], log: Path) -> tuple[float, float]:
    """Run a command. Returns CPU seconds and the most GB, of all its processes together."""
    peak = pid = 0
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        while not pid:
            time.sleep(0.2)
            peak = max(peak, memory_of(process.pid))
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return usage.ru_utime + usage.ru_stime, peak / 2**20


def memory_of(session: int) -> int:
    """Kilobytes of the processes of a session; what several share is counted once."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if (folder / "stat").read_text().rsplit(")", 1)[1].split()[3] == str(session):
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def main() -> None:
    """Make the set and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--objects", type=int, default=7, help="of an image, on average")
    parser.add_argument("--polygons", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", help="for the set; by default a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        size = write_set(folder, args.images, args.objects, polygons=args.polygons)
        (folder / "config.yaml").write_text(_MODEL)
        (folder / "stock.py").write_text(_STOCK)
        (folder / "data.yaml").write_text("name: set\ntrain: {json: train.json, images: images}\n")
        common = ["--config-file", f"{folder}/config.yaml", "--num-gpus", str(args.processes)]
        batch = ["SOLVER.IMS_PER_BATCH", str(args.processes)]
        ours = [sys.executable, "-m", "ssim_kd", "train", *common]
        sets = [f"[['set', '{folder}/train.json', '{folder}/images']]"]
        sets = [
            "DATASETS.REGISTER_COCO",
            *sets,
            "DATASETS.TRAIN",
            "('set',)",
            "DATASETS.TEST",
            "()",
        ]
        epochs = str(1.01 * args.processes / args.images)
        commands = {
            "stock": [sys.executable, f"{folder}/stock.py", *common, *batch, *_STEP],
            "ours": [*ours, *sets, *batch, *_STEP, *_NO_REPORT],
            "ours, --data --epochs": [
                *(*ours, "--data", f"{folder}/data.yaml", "--epochs", epochs, *batch),
                *("SOLVER.STEPS", "()", *_NO_REPORT),
            ],
        }
        best: dict[str, tuple[float, float]] = {}
        for _ in range(args.repeats):
            for title, command in commands.items():
                out = ["OUTPUT_DIR", f"{folder}/{title.split(',')[0]}{len(title)}"]
                found = measure([*command, *out], folder / "log.txt")
                best[title] = min(best.get(title, found), found)
    print(f"{args.images} images, {size / 2**20:.0f} MB, {args.processes} processes")
    print("| run | CPU seconds | of stock | GB |\n|---|---|---|---|")
    for title, (seconds, memory) in best.items():
        share = seconds / best["stock"][0]
        print(f"| {title} | {seconds:.1f} | {share:.2f} | {memory:.2f} |")


if __name__ == "__main__":
    main()
