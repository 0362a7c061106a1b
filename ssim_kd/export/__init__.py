"""Students for elsewhere: stock config and weights, TorchScript, ONNX and 8-bit ONNX."""

from .formats import ExportedDetector, ExportError, raw_detections
from .student import FILES, first_images, main

__all__ = ["FILES", "ExportError", "ExportedDetector", "first_images", "main", "raw_detections"]
