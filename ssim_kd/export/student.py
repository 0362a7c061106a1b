"""A trained student becomes stock config and weights, TorchScript, ONNX and 8-bit ONNX."""

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import inference_on_dataset
from detectron2.utils.logger import setup_logger
from omegaconf import OmegaConf
from torch import nn

from ssim_kd.checkpoint import load_strictly, read_weights
from ssim_kd.config import add_notes, read_classes, write_stock_config
from ssim_kd.config_files import is_lazy, merge_file
from ssim_kd.config_loading import load_lazy, load_yaml
from ssim_kd.data import register_datasets
from ssim_kd.engine.evaluation import build_evaluator, student_for_evaluation
from ssim_kd.projects import add_project_configs
from ssim_kd.writing import write_atomically, write_together

from .formats import (
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
# export.json is written last: if it exists, the other files belong to it.
WEIGHTS = "model.pth"
WRITTEN = ("student.yaml", WEIGHTS, *FILES.values(), "export.json")

Batches = Iterable[list[dict[str, Any]]]


@dataclass
class Student:
    """A trained student, of a YAML or a LazyConfig.

    Attributes:
        model: on the CPU, in eval mode.
        side: the shorter one of its images, in pixels.
        test, train: load images of the last of DATASETS.TEST and the first of DATASETS.TRAIN.
        evaluator: of the former.
        write_stock: writes the config that stock Detectron2 builds it from.
        classes: names in the order of the detections' classes; () if they are not known.
    """

    model: nn.Module
    side: int
    test: Callable[[], Batches]
    train: Callable[[], Batches]
    evaluator: Callable[[], Any]
    write_stock: Callable[[Path], None]
    classes: Sequence[str]


def yaml_student(args: argparse.Namespace) -> Student:
    """The student of a YAML, with MODEL.WEIGHTS."""
    args.opts = [*args.opts, "MODEL.DEVICE", "cpu"]  # what is traced runs on a CPU
    loaded = load_yaml(args, add_project_configs)
    full, as_written = loaded.cfg, get_cfg()
    as_written.set_new_allowed(True)
    merge_file(as_written, loaded.config_file)
    cfg, model = student_for_evaluation(full, resume=False)
    register_datasets(full)
    _check_sets(args, cfg)
    classes = read_classes(os.path.join(os.path.dirname(loaded.config_file), "student.yaml"))
    classes = classes or _registered_classes((*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN))

    def write_stock(path: Path) -> None:
        stock = cfg.clone()
        stock.defrost()
        stock.MODEL.DEVICE = as_written.MODEL.DEVICE
        write_stock_config(stock, str(path), weights=WEIGHTS, classes=classes)

    return Student(
        model.eval(),
        cfg.INPUT.MIN_SIZE_TEST or 640,
        lambda: build_detection_test_loader(cfg, cfg.DATASETS.TEST[-1]),
        lambda: build_detection_test_loader(cfg, cfg.DATASETS.TRAIN[0]),
        lambda: build_evaluator(cfg, cfg.DATASETS.TEST[-1], str(args.output / "inference")),
        write_stock,
        classes,
    )


def _check_sets(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Compare nothing if no set is given; raise if a flag asked for it."""
    test, train = cfg.DATASETS.TEST[-1:], cfg.DATASETS.TRAIN[:1]
    for asked, key, used in (
        (args.evaluate, "TEST", test),
        ("int8" in args.formats, "TRAIN", train),
    ):
        if asked and not set(used) & set(DatasetCatalog):
            raise ExportError(
                f"DATASETS.{key} is {cfg.DATASETS[key]}; expected a data set of Detectron2 or of "
                "DATASETS.REGISTER_COCO, to calibrate int8 or --evaluate on. The code that "
                "registers others is not run here."
            )
    if args.compare and not set(test) & set(DatasetCatalog):
        print(f"Not compared: DATASETS.TEST is {cfg.DATASETS.TEST}, none that is registered here.")
        args.compare = 0


def _registered_classes(names: Iterable[str]) -> list[str]:
    """The classes of the first set that has any and can be read."""
    for name in names:
        with contextlib.suppress(Exception):  # an export needs no data
            if not MetadataCatalog.get(name).get("thing_classes"):
                DatasetCatalog.get(name)
            return list(MetadataCatalog.get(name).thing_classes)
    return []


def lazy_student(args: argparse.Namespace) -> Student:
    """The student of a LazyConfig, with train.init_checkpoint."""
    loaded = load_lazy(args)
    cfg = loaded.cfg
    node = cfg.model.get("student", cfg.model)
    model = instantiate(node)
    load_strictly(model, read_weights(cfg.train.init_checkpoint, key="train.init_checkpoint"))
    # As evaluated, without the augmentations of the training.
    train = {**cfg.dataloader.test, "dataset": cfg.dataloader.train.dataset}

    classes = read_classes(os.path.join(os.path.dirname(loaded.config_file), "student.yaml"))
    classes = classes or _registered_classes(_names(cfg.get("dataloader", {}).get("test")))

    def write_stock(path: Path) -> None:
        LazyConfig.save(OmegaConf.create({"model": node}), str(path))
        add_notes(str(path), WEIGHTS, classes)

    return Student(
        model.cpu().eval(),
        640,
        lambda: instantiate(cfg.dataloader.test),
        lambda: instantiate(OmegaConf.create(train, flags={"allow_objects": True})),
        lambda: instantiate(cfg.dataloader.evaluator),
        write_stock,
        classes,
    )


def _names(loader: Any) -> list[str]:
    """The data sets of a loader in a LazyConfig."""
    names = OmegaConf.select(OmegaConf.create(loader or {}), "dataset.names") or []
    return [names] if isinstance(names, str) else list(names)


def first_images(batches: Batches, count: int) -> Iterator[dict[str, Any]]:
    """The first images that a loader gives, in float32."""
    images = (x for batch in batches for x in batch)
    for x in islice(images, count):
        yield {**x, "image": x["image"].float()}


def export(args: argparse.Namespace, student: Student, folder: Path) -> dict[str, ExportedDetector]:
    """Write the formats that were asked for into a folder, whence they go to ``args.output``.

    Returns:
        the exported models that run, by format. Those that cannot be exported are missing, and
        ``args.failed`` says why.
    """
    exported: dict[str, ExportedDetector] = {}
    if "stock" in args.formats:
        model = {"model": student.model.state_dict()}
        write_atomically(str(folder / WEIGHTS), lambda file: torch.save(model, file))
        student.write_stock(folder / "student.yaml")
    if set(args.formats) <= {"stock"}:
        return exported
    side = student.side
    # Unlike sizes, so that nothing that depends on one of them becomes a constant of a batch.
    sizes = [(side, side * 4 // 3 // (1 + i % 2)) for i in range(args.batch)]
    path = {name: folder / file for name, file in FILES.items()}
    try:
        adapter = tracing_adapter(student.model, sizes)
        args.outputs = output_names(adapter)
        if "torchscript" in args.formats:
            export_torchscript(adapter, path["torchscript"], student.classes)
            found = ExportedDetector.torchscript(path["torchscript"], args.outputs)
            exported["torchscript"] = found
        if {"onnx", "int8"} & set(args.formats):
            export_onnx(adapter, path["onnx"], student.classes)
            exported["onnx"] = ExportedDetector.onnx(path["onnx"])
        if "int8" in args.formats:
            images = first_images(student.train(), args.calibrate)
            quantize(path["onnx"], path["int8"], (x["image"].numpy() for x in images))
            exported["int8"] = ExportedDetector.onnx(path["int8"])
    except ExportError as error:
        args.failed = str(error)
    return exported


@torch.no_grad()
def compare(
    student: Student, exported: dict[str, ExportedDetector], args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """How far each exported model's detections are from PyTorch's; see :func:`agreement`."""
    inputs = list(first_images(student.test(), args.compare))
    count = args.batch
    batches = [inputs[i : i + count] for i in range(0, len(inputs) - count + 1, count)]
    expected = [found for batch in batches for found in raw_detections(student.model, batch)]
    return {
        name: agreement([d for batch in batches for d in detector.raw(batch)], expected)
        for name, detector in exported.items()
    }


def main(args: argparse.Namespace) -> None:
    """Export, compare, evaluate, print, write; the arguments of ``ssim-kd export``.

    Raises:
        ValueError: what cannot be exported, or a wrong argument.
    """
    args.eval_only = True  # for load_config: nothing is trained
    args.outputs, args.failed = [], ""
    if args.batch < 1 or (args.batch > 1 and ("int8" in args.formats or args.evaluate)):
        raise ValueError(
            f"--batch is {args.batch}; expected 1 or more, and 1 with int8 and --evaluate."
        )
    setup_logger()
    student = (lazy_student if is_lazy(args.config_file) else yaml_student)(args)
    with write_together(args.output, WRITTEN) as folder:
        exported = export(args, student, folder)
        found = {"formats": args.formats, "batch": args.batch, "outputs": args.outputs}
        found["classes"] = list(student.classes)
        if args.compare and exported:
            found["agreement"] = compare(student, exported, args)
        if args.evaluate:
            found["AP"] = {}
            for name, detector in {"pytorch": student.model, **exported}.items():
                results = inference_on_dataset(detector, student.test(), student.evaluator())
                found["AP"][name] = float(results["bbox"]["AP"])
        report(found)
        (folder / "export.json").write_text(json.dumps(found, indent=1))
    print(f"Written to {args.output}")
    if args.failed:
        raise ExportError(args.failed)


def report(found: dict[str, Any]) -> None:
    """Print the figures, a line each."""
    for name, row in found.get("agreement", {}).items():
        if not row["expected"]:
            print(f"{name:12s} not compared: the student detects nothing on these images")
            continue
        print(
            f"{name:12s} {row['matched']} of {row['expected']} detections match, {row['more']} "
            f"more; boxes differ by {row['pixels']:.2g} pixels, scores by {row['score']:.2g}"
        )
    for name, value in found.get("AP", {}).items():
        print(f"{name:12s} {value:.2f} AP")
