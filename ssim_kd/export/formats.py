"""What is exported, and how it runs again: TorchScript, ONNX and 8-bit ONNX of a stock detector.

The exported graph takes images (3, H, W), float32 in [0, 255], in the order of INPUT.FORMAT and
resized as INPUT.MIN_SIZE_TEST has it. It normalises and pads them itself, and returns boxes (R, 4)
in pixels of the image it was given, classes (R,), scores (R,), masks (R, 1, 28, 28) or keypoints
(R, K, 3) if there are some, and the image's size (height, width).
"""

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.export import TracingAdapter
from detectron2.layers import shapes_to_tensor
from detectron2.modeling import GeneralizedRCNN, PanopticFPN, detector_postprocess
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from torch import nn
from torch.nn import functional as F

from ssim_kd.writing import write_atomically

# The first with ROIAlign as Detectron2 aligns it (half a pixel) is 16.
OPSET = 17
# Detections below it are not compared: of near-ties any may be cut off.
SCORE = 0.05
#: Name of the exported models' extra file or metadata with the class names, a JSON list.
CLASSES = "classes.json"

# Names of the outputs for those of Detectron2's Instances.
_FIELDS = {
    "pred_boxes": "boxes",
    "pred_classes": "classes",
    "pred_masks": "masks",
    "pred_keypoints": "keypoints",
    "pred_keypoint_heatmaps": "keypoint_heatmaps",
}


class ExportError(ValueError):
    """A model that cannot be exported; the message names it and what can be."""


def raw_detections(model: Any, batched_inputs: list[dict[str, Any]]) -> list[Instances]:
    """A detector's output in pixels of the images it was given, without post-processing.

    Raises:
        ExportError: the detector is of a kind that is not exported.
    """
    if _is_rcnn(model):
        return list(model.inference(batched_inputs, do_postprocess=False))
    if isinstance(model, DenseDetector):
        return _detect(model, model.preprocess_image(batched_inputs))
    raise ExportError(
        f"{type(model).__name__} is not exported to TorchScript or ONNX; expected a "
        "GeneralizedRCNN (Faster, Mask, Cascade, Keypoint R-CNN) or a dense detector (RetinaNet, "
        "FCOS). Its stock config and weights are (--formats stock)."
    )


def _is_rcnn(model: nn.Module) -> bool:
    return isinstance(model, GeneralizedRCNN) and not isinstance(model, PanopticFPN)


def _detect(model: Any, images: ImageList) -> list[Instances]:
    """What detectors do after their preprocessing."""
    maps = model.backbone(images.tensor)
    if _is_rcnn(model):
        proposals, _ = model.proposal_generator(images, maps, None)
        return list(model.roi_heads(images, maps, proposals, None)[0])
    features = [maps[name] for name in model.head_in_features]
    return list(model.forward_inference(images, features, model.head(features)))


def _traceable_batch(model: Any, images: list[torch.Tensor]) -> ImageList:
    """As ``preprocess_image``, whose copies into a batch of several are lost on the way to ONNX."""
    images = [(image - model.pixel_mean) / model.pixel_std for image in images]
    sizes = [shapes_to_tensor(image.shape[-2:]) for image in images]
    stride = max(model.backbone.size_divisibility, 1)
    most = (torch.stack(sizes).max(0).values + (stride - 1)) // stride * stride
    padded = [
        F.pad(image, [0, most[1] - size[1], 0, most[0] - size[0]])
        for image, size in zip(images, sizes, strict=True)
    ]
    return ImageList(torch.stack(padded), sizes)


def tracing_adapter(model: nn.Module, sizes: Sequence[tuple[int, int]]) -> TracingAdapter:
    """Detectron2's adapter around a detector, run once.

    Args:
        model: on the CPU, in eval mode.
        sizes: height and width of an example of each image of a batch. The exported model takes
            so many images, each of any size.
    """
    generator = torch.Generator().manual_seed(0)
    channels = int(model.pixel_mean.numel())  # type: ignore[operator, union-attr]
    images = (torch.rand(channels, h, w, generator=generator) * 255 for h, w in sizes)
    inputs = [{"image": image} for image in images]

    def inference(model: nn.Module, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if len(inputs) == 1:
            found = raw_detections(model, inputs)
        else:
            found = _detect(model, _traceable_batch(model, [x["image"] for x in inputs]))
        return [{"instances": instances} for instances in found]

    raw_detections(model, inputs[:1])  # refuses what is not exported
    adapter = TracingAdapter(model, inputs, inference).eval()
    adapter(*adapter.flattened_inputs)
    return adapter


def output_names(adapter: TracingAdapter) -> list[str]:
    """Names of the flattened outputs: boxes, classes, scores, size; with numbers for a batch."""
    names = []
    images = adapter.outputs_schema.schemas
    for index, image in enumerate(images):
        fields = [_FIELDS.get(key, key) for key in image.schemas[0].keys]
        number = str(index) if len(images) > 1 else ""
        names += [name + number for name in (*fields, "size")]
    return names


def export_torchscript(adapter: TracingAdapter, path: Path, classes: Sequence[str] = ()) -> None:
    """Trace the detector; to run it needs neither Detectron2 nor ssim_kd.

    It needs ``import torchvision`` for its operators. The names of the classes are its extra file
    "classes.json".
    """
    with _quiet(), torch.no_grad():
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    traced.requires_grad_(False)  # else its outputs have a gradient, and no .numpy()
    # A full disk ends torch's own writer, and with it the process.
    content = io.BytesIO()
    torch.jit.save(traced, content, _extra_files={CLASSES: json.dumps([*classes])})
    write_atomically(str(path), lambda file: file.write(content.getbuffer()))


def export_onnx(adapter: TracingAdapter, path: Path, classes: Sequence[str] = ()) -> None:
    """Write the detector as ONNX, opset 17, for images of any size.

    The names of the classes are its metadata "classes.json".

    Raises:
        ExportError: an operator of the model that ONNX lacks.
    """
    _require_packages()
    count = len(adapter.flattened_inputs)
    inputs = [f"image{i}" for i in range(count)] if count > 1 else ["image"]
    content = io.BytesIO()
    sides = {name: {1: f"height_{name}", 2: f"width_{name}"} for name in inputs}
    try:
        with _quiet(), torch.no_grad():
            # The exporter by torch.export refuses sizes that depend on data, as R-CNN's do.
            torch.onnx.export(
                adapter,
                adapter.flattened_inputs,
                content,  # type: ignore[arg-type]  # a file object works without dynamo
                input_names=inputs,
                output_names=output_names(adapter),
                dynamic_axes=sides,
                opset_version=OPSET,
                dynamo=False,
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[:1]
        raise ExportError(
            f"{type(adapter.model).__name__} cannot be written as ONNX by torch "
            f"{torch.__version__} ({type(error).__name__}: {(reason or [''])[0][:200]}). Keypoint "
            "heads cannot; its TorchScript can be exported (--formats torchscript)."
        ) from error
    import onnx

    model = onnx.load_model_from_string(content.getvalue())
    onnx.helper.set_model_props(model, {CLASSES: json.dumps([*classes])})
    write_atomically(str(path), lambda file: file.write(model.SerializeToString()))


def _require_packages() -> None:
    lacking = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if lacking:
        raise ExportError(f"{lacking} are not installed: pip install 'ssim_kd[export]'.")


def quantize(path: Path, target: Path, images: Iterable[np.ndarray]) -> None:
    """Write an ONNX model with 8-bit convolutions and matrix products, calibrated on images.

    Args:
        path: of the ONNX model, with one image as its input.
        target: of the 8-bit one.
        images: (3, H, W) float32 each.
    """
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {"image": image}

    with _quiet():
        quantization.quantize_static(
            str(path),
            str(target),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )


class ExportedDetector(nn.Module):
    """An exported model with the interface of a Detectron2 detector in eval mode."""

    def __init__(
        self,
        run: Callable[[list[torch.Tensor]], Sequence[Any]],
        names: Sequence[str],
    ) -> None:
        """
        Args:
            run: maps the images of a batch to the flattened outputs.
            names: of these; see :func:`output_names`.
        """
        super().__init__()
        self._run, self.names = run, [name.rstrip("0123456789") for name in names]
        self.eval()

    @classmethod
    def torchscript(cls, path: Path, names: Sequence[str]) -> "ExportedDetector":
        """A TorchScript file on the CPU."""
        model = torch.jit.load(str(path))
        return cls(lambda images: model(*images), names)

    @classmethod
    def onnx(cls, path: Path, *, threads: int = 0) -> "ExportedDetector":
        """An ONNX file in onnxruntime on the CPU; ``threads`` as torch's, or 0 for its default."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        inputs = [node.name for node in session.get_inputs()]

        def run(images: list[torch.Tensor]) -> list[torch.Tensor]:
            feed = {k: image.numpy() for k, image in zip(inputs, images, strict=True)}
            return [torch.from_numpy(np.asarray(x)) for x in session.run(None, feed)]

        return cls(run, [node.name for node in session.get_outputs()])

    @torch.no_grad()
    def raw(self, batched_inputs: list[dict[str, Any]]) -> list[Instances]:
        """The detections in pixels of the images given, as :func:`raw_detections`."""
        outputs = iter(self._run([x["image"].float() for x in batched_inputs]))
        fields = self.names[: self.names.index("size") + 1]
        found = []
        for _ in batched_inputs:
            values = dict(zip(fields, islice(outputs, len(fields)), strict=True))
            height, width = (int(side) for side in values.pop("size"))
            instances = Instances((height, width), scores=values.pop("scores"))
            instances.pred_boxes = Boxes(values.pop("boxes"))
            for name, value in values.items():
                instances.set(f"pred_{name}", value)
            found.append(instances)
        return found

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """As a Detectron2 detector in eval mode."""
        found = []
        for x, instances in zip(batched_inputs, self.raw(batched_inputs), strict=True):
            height, width = instances.image_size
            size = x.get("height", height), x.get("width", width)
            found.append({"instances": detector_postprocess(instances, *size)})
        return found


def agreement(
    found: Sequence[Instances], expected: Sequence[Instances], *, score: float = SCORE
) -> dict[str, Any]:
    """How an exported model's detections compare with PyTorch's, of those above a score.

    Each expected detection is paired with a free one of its class at its place.

    Returns:
        the number ``expected``, the number ``matched`` with an IoU of 0.95 or more, the number
        of ``more`` detections, and of the pairs the greatest difference of a box's corner in pixels
        and of a score.
    """
    total = matched = more = 0
    pixels = scores = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = ours[ours.scores >= score], theirs[theirs.scores >= score]
        total += len(theirs)
        overlaps = pairwise_iou(theirs.pred_boxes, ours.pred_boxes)
        apart = torch.cdist(theirs.pred_boxes.tensor, ours.pred_boxes.tensor, p=float("inf"))
        overlaps[apart <= 0.1] = 1  # boxes without an area have no overlap
        overlaps[theirs.pred_classes[:, None] != ours.pred_classes[None]] = 0
        pairs = 0
        for i in theirs.scores.argsort(descending=True).tolist():
            if not len(ours) or overlaps[i].max() < 0.95:
                continue
            # Of detections at one place, that of the nearest score.
            near = (overlaps[i] >= 0.95).nonzero().flatten()
            j = near[(ours.scores[near] - theirs.scores[i]).abs().argmin()]
            gap = (ours.pred_boxes.tensor[j] - theirs.pred_boxes.tensor[i]).abs().max()
            pixels, scores = (
                max(pixels, float(gap)),
                max(scores, float((ours.scores[j] - theirs.scores[i]).abs())),
            )
            overlaps[:, j] = 0
            pairs += 1
        matched += pairs
        more += len(ours) - pairs
    counts = {"expected": total, "matched": matched, "more": more}
    return {**counts, "pixels": pixels, "score": scores}


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the tracers' warnings: what they warn of is what :func:`agreement` measures."""
    level = logging.root.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.root.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logging.root.setLevel(level)
