"""Pictures: detections next to the ground truth, and SSIM loss maps by level.

Shapes: N images, C channels, H x W cells; pictures are (height, width, 3) uint8 RGB.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from .losses import minmax_scale, ssim_map
from .modeling import DistillBatch, PyramidDistiller, SSIMDistiller, Tap

Picture = NDArray[np.uint8]

#: Ends of the colour scale: 0 if the maps agree, 0.5 if they have nothing in common.
LOSS_RANGE = (0.0, 0.5)
#: Channels that SSIM's maps are made of at a time.
CHANNELS_AT_ONCE = 32
_CLASS_COLOURS = colormaps["tab10"]


@dataclass(frozen=True)
class LossMaps:
    """A level compared cell by cell; each (N, H, W) float32 on the CPU.

    Means over the channels, of the scaled maps. Cells in the padding of an image are NaN.

    Attributes:
        student, teacher: the activations, in [0, 1] if the maps are scaled.
        loss: (1 - SSIM) / 2, in about [0, 1], 0 where student and teacher agree.
        luminance, contrast: in [0, 1], 1 where means and variances agree.
        structure: in [-1, 1], the correlation.
        l2: the squared difference, in [0, 1] if the maps are scaled.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    loss: torch.Tensor
    luminance: torch.Tensor
    contrast: torch.Tensor
    structure: torch.Tensor
    l2: torch.Tensor


def draw_detections(
    image: Picture,
    instances: Instances,
    class_names: Sequence[str],
    *,
    scale: float = 1.0,
    min_score: float = 0.5,
) -> Picture:
    """Draw boxes with classes and scores, or ground truth, on an enlarged image.

    Args:
        image: (height, width, 3) RGB.
        instances: ``pred_boxes``, ``pred_classes`` and ``scores``, or ``gt_boxes`` and
            ``gt_classes``; boxes in pixels of ``image``.
        class_names: by class number.
        scale: of the result's side to the image's; small images need 2 or more for legible text.
        min_score: detections below it are left out.

    Returns:
        (height * scale, width * scale, 3) RGB. A class has the same colour in every picture.
    """
    instances = instances.to("cpu")
    if instances.has("gt_boxes"):
        boxes, classes = instances.gt_boxes.clone(), instances.gt_classes
        labels = [class_names[c] for c in classes.tolist()]
    else:
        instances = instances[instances.scores >= min_score]
        boxes, classes = instances.pred_boxes.clone(), instances.pred_classes
        labels = [
            f"{class_names[c]} {score:.0%}"
            for c, score in zip(classes.tolist(), instances.scores.tolist(), strict=True)
        ]
    enlarged = resize(image, round(image.shape[0] * scale), round(image.shape[1] * scale))
    boxes.scale(scale, scale)
    canvas = Visualizer(enlarged)
    drawn = canvas.overlay_instances(
        boxes=boxes,
        labels=labels,
        assigned_colors=[_CLASS_COLOURS(c % 10)[:3] for c in classes.tolist()],
        alpha=0.9,
    )
    return np.ascontiguousarray(drawn.get_image())


def resize(image: Picture, height: int, width: int) -> Picture:
    """Resize a picture (H, W, 3) to (height, width, 3), bicubically."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def heatmap(
    values: torch.Tensor,
    height: int,
    width: int,
    *,
    limits: tuple[float, float] = LOSS_RANGE,
    colours: str = "inferno",
) -> Picture:
    """Colour a map, cell by cell.

    Args:
        values: (H, W); NaN is drawn grey.
        height, width: of the result in pixels.
        limits: values at the ends of the colour scale; beyond them the end's colour is taken.
        colours: name of a colour map of matplotlib.

    Returns:
        (height, width, 3) RGB; cells have sharp edges, so that the level's resolution is seen.
    """
    low, high = limits
    cells = values.detach().cpu().float().numpy()
    colour_map = colormaps[colours].with_extremes(bad="0.5")
    rgb = colour_map(np.ma.masked_invalid((cells - low) / (high - low)), bytes=True)[..., :3]
    enlarged = Image.fromarray(rgb).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(enlarged)


@torch.no_grad()
def loss_maps(model: Any, batched_inputs: list[dict[str, Any]]) -> dict[str, LossMaps]:
    """Compare the features of student and teacher on some images.

    Neither weights nor running statistics nor random numbers are touched: the student's backbone
    is in eval mode meanwhile.

    Args:
        model: a DistilledDetector with a teacher and a distiller that compares maps by level; of
            several, the first. If that compares by another loss than SSIM, the maps are those of
            SSIM with its default options.
        batched_inputs: as for every Detectron2 model; ``image`` is (3, H, W) in [0, 255].

    Returns:
        the maps by level.

    Raises:
        ValueError: a model without a teacher or without such a distiller.
    """
    distiller, student = pyramid_distiller(model), model.student
    inputs = [{**x, "image": x["image"].to(model.device)} for x in batched_inputs]
    teacher_features = model.load_teacher()([x["image"] for x in inputs])
    with _eval_mode(student), Tap(student, distiller.levels) as student_features:
        student(inputs)  # heads too: some meta-architectures do not expose their preprocessing

    options = {"scaling": "channel"}
    if isinstance(distiller, SSIMDistiller):
        options = {**distiller.options, "padding": "same"}
    batch = DistillBatch.from_inputs(batched_inputs, device=model.device)
    found = {}
    for level in distiller.levels:
        aligned = (level, student_features[level], teacher_features[level], batch)
        _, ours, theirs, mask = distiller.align(*aligned)
        found[level] = _compare(ours, theirs, mask, options)
    return found


def pyramid_distiller(model: Any) -> PyramidDistiller:
    """The first distiller of a model that compares maps level by level.

    Raises:
        ValueError: there is none, or no teacher.
    """
    if getattr(model, "missing_teacher", None) is not None:
        raise model.missing_teacher
    distillers = getattr(model, "distillers", {}).values()
    found = [d for d in distillers if isinstance(d, PyramidDistiller)]
    if not found:
        raise ValueError(
            "There is nothing to compare: the model has no teacher, or no distiller compares maps "
            "by level."
        )
    return found[0]


class _eval_mode:
    """Puts every submodule into eval mode, and back into the mode that each was in."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = {module: module.training for module in model.modules()}

    def __enter__(self) -> None:
        for module in self._modes:
            module.training = False

    def __exit__(self, *_exc_info: object) -> None:
        for module, training in self._modes.items():
            module.training = training


def _compare(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    options: dict[str, Any],
) -> LossMaps:
    scope = options["scaling"]
    if scope is not None:
        student, teacher = (minmax_scale(m, scope=scope, mask=mask) for m in (student, teacher))
    options = {**options, "scaling": None}
    size = (7, len(student), *student.shape[2:])
    means = student.new_zeros(size, dtype=torch.float32)
    # SSIM's maps by cell and channel would take twenty times the features' memory: in groups.
    channels = student.shape[1]
    for n, c in itertools.product(range(len(student)), range(0, channels, CHANNELS_AT_ONCE)):
        group = [m[n : n + 1, c : c + CHANNELS_AT_ONCE].float() for m in (student, teacher)]
        terms = ssim_map(*group, components=True, **options)
        loss, l2 = 0.5 * (1.0 - ssim_map(*group, **options)), (group[0] - group[1]).square()
        for mean, x in zip(means, (*group, loss, *terms, l2), strict=True):
            mean[n] += x[0].sum(dim=0) / channels
    if mask is not None:
        means.masked_fill_(~mask, float("nan"))
    return LossMaps(*means.cpu())


def loss_map_images(
    model: Any, batched_inputs: list[dict[str, Any]], *, input_format: str = "BGR"
) -> dict[str, Picture]:
    """Draw the loss maps of every level, e.g. for TensorBoard.

    Args:
        model, batched_inputs: as in :func:`loss_maps`.
        input_format: channel order of the images, ``cfg.INPUT.FORMAT``.

    Returns:
        one picture by level: a row for each image with the image, and over it the panels
        :data:`PANELS`.
    """
    pictures, strides = {}, pyramid_distiller(model).strides
    for level, maps in loss_maps(model, batched_inputs).items():
        rows = []
        for index, record in enumerate(batched_inputs):
            image = to_rgb(record["image"], input_format)
            panels = map_panels(maps, index, image, strides[level]).values()
            rows.append(np.concatenate([image, *panels], axis=1))
        widest = max(row.shape[1] for row in rows)
        rows = [np.pad(row, ((0, 0), (0, widest - row.shape[1]), (0, 0))) for row in rows]
        pictures[level] = np.concatenate(rows, axis=0)
    return pictures


#: The maps that are drawn and the ends of their colour scale; None: the map's own. The terms are 1
#: where student and teacher agree: their scales run backwards.
PANELS: dict[str, tuple[float, float] | None] = {
    "student": None,
    "teacher": None,
    "loss": LOSS_RANGE,
    "luminance": (1.0, 0.0),
    "contrast": (1.0, 0.0),
    "structure": (1.0, 0.0),
    "l2": None,
}


def map_panels(maps: LossMaps, index: int, image: Picture, stride: int) -> dict[str, Picture]:
    """Draw the maps of one level over an image.

    Args:
        maps: of the level.
        index: of the image in the batch.
        image: (height, width, 3) RGB, as the model got it.
        stride: of the level, in pixels.

    Returns:
        pictures (height, width, 3) by the names of :data:`PANELS`, a third of each the image.
    """
    height, width = image.shape[:2]
    panels = {}
    for name, limits in PANELS.items():
        cells = getattr(maps, name)[index]
        if limits is None:
            known = cells[cells.isfinite()]
            low, high = (float(known.min()), float(known.max())) if known.numel() else (0.0, 1.0)
            limits = (low, max(high, low + 1e-6))
        # The whole map, padded cells included, then the part that shows the image.
        drawn = heatmap(cells, cells.shape[0] * stride, cells.shape[1] * stride, limits=limits)
        drawn = drawn[:height, :width]
        beyond = ((0, height - drawn.shape[0]), (0, width - drawn.shape[1]), (0, 0))
        panels[name] = (np.pad(drawn, beyond) * (2 / 3) + image / 3).astype(np.uint8)
    return panels


def to_rgb(image: torch.Tensor, input_format: str = "BGR") -> Picture:
    """Turn a model's input (3, H, W) in [0, 255] into a picture (H, W, 3)."""
    pixels = image.detach().cpu().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return np.ascontiguousarray(pixels[..., ::-1] if input_format == "BGR" else pixels)
