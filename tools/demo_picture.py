"""The demo's picture: detections of the three next to the truth, and SSIM loss maps by level."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.modeling import build_model
from detectron2.structures import Instances
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image
from torch import nn

from ssim_kd.checkpoint import load_strictly, read_checkpoint, read_weights
from ssim_kd.config import student_config
from ssim_kd.data import register_digits
from ssim_kd.modeling import DistilledDetector
from ssim_kd.visualization import draw_detections, heatmap, loss_maps, to_rgb

TEST_SET = "digits_test"
# Not chosen for what they show: the first images with at least so many digits.
NUM_IMAGES, LEAST_DIGITS = 3, 4
# Detections below it are not drawn.
MIN_SCORE = 0.4
# Ends of the colour scale of the loss maps; without any training the loss is near 0.5.
LIMITS = (0.0, 0.3)
# Side of a panel in inches, and pixels an inch.
SIDE, DPI = 1.75, 100


def load_student(cfg: CfgNode, folder: Path) -> nn.Module:
    """The plain detector of a finished training of the demo, in eval mode."""
    model = build_model(student_config(cfg))
    load_strictly(model, read_weights(str(folder / "model_final.pth"), key="MODEL.WEIGHTS"))
    return model.eval()


def load_distilled(cfg: CfgNode, folder: Path) -> DistilledDetector:
    """The distilled student with its teacher and its adapters as they were at the end."""
    model = build_model(cfg)
    path = str(folder / "model_final.pth")
    load_strictly(model.student, read_weights(path, key="MODEL.WEIGHTS"))
    model.distillers.load_state_dict(read_checkpoint(path)["distillers"])
    return model.eval()


def load_test_images(cfg: CfgNode, count: int, *, least_digits: int = 0) -> list[dict[str, Any]]:
    """The first ``count`` inputs of the test split that show at least so many digits.

    Each has ``image`` (3, H, W) in the channel order of ``cfg``, and ``instances``, the truth.
    """
    register_digits(cfg)
    records = [r for r in DatasetCatalog.get(TEST_SET) if len(r["annotations"]) >= least_digits]
    mapper = DatasetMapper(cfg, is_train=False)
    inputs = []
    for record in records[:count]:
        mapped = mapper(record)
        size = mapped["image"].shape[-2:]
        mapped["instances"] = utils.annotations_to_instances(
            [utils.transform_instance_annotations(a, [], size) for a in record["annotations"]], size
        )
        inputs.append(mapped)
    return inputs


def draw_demo(configs: dict[str, CfgNode], path: Path, summary: dict[str, dict[str, Any]]) -> None:
    """Write the picture.

    Args:
        configs: of the trainings, by key; their OUTPUT_DIR holds the weights.
        path: of the PNG file.
        summary: "AP" by key, for the titles.
    """
    cfg = configs["student"]
    inputs = load_test_images(cfg, NUM_IMAGES, least_digits=LEAST_DIGITS)
    names = MetadataCatalog.get(TEST_SET).thing_classes
    images = [to_rgb(x["image"], cfg.INPUT.FORMAT) for x in inputs]

    columns: list[tuple[str, list[np.ndarray]]] = []

    def add_detections(title: str, found: list[Instances]) -> None:
        pairs = zip(images, found, strict=True)
        columns.append(
            (
                title,
                [draw_detections(i, f, names, scale=1.5, min_score=MIN_SCORE) for i, f in pairs],
            )
        )

    add_detections("ground truth", [x["instances"] for x in inputs])
    titles = {"teacher": "teacher", "student": "plain student", "distilled": "distilled student"}
    with torch.no_grad():
        for key, title in titles.items():
            model = load_student(configs[key], Path(configs[key].OUTPUT_DIR))
            found = [output["instances"] for output in model(inputs)]
            add_detections(f"{title}\n{summary[key]['AP']:.1f} AP", found)

    distilled = load_distilled(configs["distilled"], Path(configs["distilled"].OUTPUT_DIR))
    maps = loss_maps(distilled, inputs)
    for level, found_maps in maps.items():
        # A map of a few cells says little to the eye.
        if found_maps.loss.shape[-1] < 4:
            continue
        pairs = zip(found_maps.loss, images, strict=True)
        drawn = [heatmap(cells, *image.shape[:2], limits=LIMITS) for cells, image in pairs]
        columns.append((f"SSIM loss {level}\nmean {found_maps.loss.nanmean():.2f}", drawn))
    _compose(columns).savefig(path, dpi=DPI)
    _shrink(path)


def _compose(columns: list[tuple[str, list[np.ndarray]]]) -> Figure:
    rows = len(columns[0][1])
    width = SIDE * len(columns) + 0.6
    layout = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    figure = Figure(figsize=(width, SIDE * rows + 0.5), layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (title, pictures) in enumerate(columns):
        axes[0, column].set_title(title, fontsize=10)
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture, interpolation="antialiased")
            axes[row, column].axis("off")
    scale = ScalarMappable(Normalize(*LIMITS), "inferno")
    bar = figure.colorbar(scale, ax=axes, fraction=0.015, pad=0.005, aspect=40)
    bar.set_label("(1 - SSIM) / 2 of distilled student and teacher", fontsize=9)
    return figure


def _shrink(path: Path) -> None:
    """Keep 256 colours: less than half the size, for a README."""
    with Image.open(path) as image:
        full = image.convert("RGB")
    palette = full.quantize(256, Image.Quantize.FASTOCTREE)
    full.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
