"""What the benchmarks share: memory and clock, the machine they ran on, detectors to time."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.utils.hooks import RemovableHandle

from ssim_kd.config import add_distill_config
from ssim_kd.engine.report import commit
from ssim_kd.projects import add_project_configs

ROOT = Path(__file__).resolve().parent.parent
PAIRS = {
    "Faster R-CNN R50 <- R101": "ssim_faster_rcnn_R_50_FPN_1x_from_R_101.yaml",
    "Faster R-CNN R50 <- X101": "ssim_faster_rcnn_R_50_FPN_1x.yaml",
    "RetinaNet R50 <- R101": "ssim_retinanet_R_50_FPN_1x.yaml",
}
PACKAGES = (
    "torch",
    "triton",
    "detectron2",
    "kornia",
    "pytorch-msssim",
    "torchmetrics",
    "piq",
    "fused-ssim",
)


def neutralise_malloc() -> bool:
    """Keep glibc from giving freed memory back: page faults would slow down large allocations."""
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    try:
        libc = ctypes.CDLL(None)
        settings = ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**28))
        return sum(libc.mallopt(name, value) for name, value in settings) == len(settings)
    except (OSError, AttributeError):
        return False


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [v for v in cpuinfo.read_text().splitlines() if v.startswith("model name")]
        processor = lines[0].split(":", 1)[1].strip() if lines else processor
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or processor,
        "cpu": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit() or "unknown",
        "load": os.getloadavg(),
    }


def describe(env: dict[str, Any]) -> str:
    """The environment in a line."""
    versions = ", ".join(f"{k} {v}" for k, v in env["versions"].items())
    return (
        f"{env['device']}, {env['threads']} thread(s), {env['instructions']}; {versions}; "
        f"commit {env['commit']}"
    )


def shipped_config(name: str, device: str, loss: str = "ssim") -> CfgNode:
    """The config of a pair, with "l1", "l2" or "ssim", or a method by the name of its configs.

    A method's own keys and levels are those of its config for the same detector.

    Raises:
        ValueError: a method without a config for the pair's detector.
    """
    cfg = get_cfg()
    add_distill_config(cfg)
    add_project_configs(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "COCO-Detection" / PAIRS[name]))
    cfg.MODEL.DEVICE = device
    if loss in ("l1", "l2", "ssim"):
        cfg.MODEL.DISTILL.LOSS = loss
        return cfg
    file = method_config(name, loss)
    if file is None:
        raise ValueError(f"{loss!r} has no config for {name!r} in projects/*/configs.")
    teacher = cfg.MODEL.DISTILL.TEACHER.clone()
    cfg.merge_from_file(str(file))
    cfg.MODEL.DISTILL.TEACHER = teacher
    return cfg


def method_config(name: str, method: str) -> Path | None:
    """The shipped config of a method for the detector of a pair, if there is one."""
    student = PAIRS[name].removesuffix(".yaml").split("_", 1)[1].split("_from_")[0]
    found = sorted(ROOT.glob(f"projects/*/configs/{method}_{student}.yaml"))
    return found[0] if found else None


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
    """Seconds of a block: by events on a GPU, read after the run; by the host's clock elsewhere.

    With ``cpu_time`` they are the processor's for this process, which a machine that is shared with
    other work stretches less.
    """

    def __init__(self, device: str, *, cpu_time: bool = False) -> None:
        self.on_gpu = device.startswith("cuda")
        self._read = time.process_time if cpu_time else time.perf_counter
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
            return self._read()
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
