"""The boxes that ICD asks its decoder for, and the decoder.

Shapes: N images, Q boxes an image, S cells of all levels, D width of the decoder, h heads.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssim_kd.losses import has_area

#: Scales of a box: up to 64 pixels, 128, 256, 512, and above.
NUM_SCALES = 5


class Queries(NamedTuple):
    """Real and fake boxes, padded to the image with the most.

    Attributes:
        boxes: (N, Q, 4), x0, y0, x1, y1 as shares of the image's width and height.
        centers: (N, Q, 2), x and y within the boxes, not quite their centres.
        pixels: (N, Q, 2), width and height of the boxes in pixels.
        classes: (N, Q).
        real: (N, Q) bool, False for fake boxes and for padding.
        valid: (N, Q) bool, False for padding.
    """

    boxes: Tensor
    centers: Tensor
    pixels: Tensor
    classes: Tensor
    real: Tensor
    valid: Tensor


def draw_queries(
    boxes: Sequence[Tensor],
    classes: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
    *,
    num_classes: int,
    fake_ratio: float,
    max_boxes: int,
    fake_size: tuple[float, float],
    jitter: float,
    generator: torch.Generator,
) -> Queries:
    """The ground truth of each image, and fake boxes next to it.

    Args:
        boxes: of each image (R, 4), x0, y0, x1, y1 in pixels. Those without area are left out.
        classes: of each image (R,).
        image_sizes: (height, width) in pixels.
        num_classes: of which a fake box has any, all alike.
        fake_ratio: fake boxes for each real one.
        max_boxes: of an image; real ones are kept even if they are more.
        fake_size: mean and deviation of the sides of a fake box, as shares of the image's.
        jitter: largest distance from a box's centre, in widths and heights.
        generator: of what is random, on the device of the boxes.
    """
    device = generator.device
    kept = [has_area(tensor) for tensor in boxes]
    boxes = [tensor[keep].float() for tensor, keep in zip(boxes, kept, strict=True)]
    classes = [tensor[keep] for tensor, keep in zip(classes, kept, strict=True)]
    totals = [min(max(1, int(len(b) * (fake_ratio + 1))), max(max_boxes, len(b))) for b in boxes]
    shape = (len(boxes), max(totals))

    def uniform(*last: int) -> Tensor:
        return torch.rand(*shape, *last, generator=generator, device=device)

    mean, deviation = fake_size
    normal = torch.randn(*shape, 2, generator=generator, device=device).clamp(-2, 2)
    half = (mean + deviation * normal).clamp(2e-3, 0.7) / 2
    center = uniform(2).clamp(0.03, 0.97)
    found = torch.cat([center - half, center + half], dim=-1).clamp(0, 1)
    labels = torch.randint(num_classes, shape, generator=generator, device=device)
    real = torch.zeros(shape, dtype=torch.bool, device=device)
    valid = torch.zeros_like(real)
    scale = torch.tensor([[w, h, w, h] for h, w in image_sizes], device=device).float()
    for i, (tensor, label, total) in enumerate(zip(boxes, classes, totals, strict=True)):
        found[i, : len(tensor)] = tensor / scale[i]
        labels[i, : len(label)] = label
        real[i, : len(tensor)] = True
        valid[i, :total] = True
    sides = found[..., 2:] - found[..., :2]
    centers = (found[..., :2] + found[..., 2:]) / 2 + (2 * uniform(2) - 1) * jitter * sides
    return Queries(found, centers, sides * scale[:, None, :2], labels, real, valid)


def sine_encoding(x: Tensor, dim: int) -> Tensor:
    """sin and cos of 2 pi x / 10000^(2 i / dim), i from 0 to dim / 2 - 1.

    Args:
        x: (..., 2), of which each is encoded by ``dim``.
        dim: even.

    Returns:
        (..., 2 dim).
    """
    steps = torch.arange(0, dim, 2, device=x.device, dtype=x.dtype)
    angles = 2 * math.pi * x[..., None] / 10000 ** (steps / dim)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def cell_positions(mask: Tensor) -> Tensor:
    """x and y of each cell of a map, as shares of the image: above 0, 1 at the last valid cell.

    Args:
        mask: (N, H, W) bool, True where a cell is valid.

    Returns:
        (N, H, W, 2) float32.
    """
    x, y = (mask.cumsum(dim, dtype=torch.float32) for dim in (2, 1))
    return torch.stack([x / x[:, :, -1:].clamp(min=1), y / y[:, -1:].clamp(min=1)], dim=-1)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Three linear layers."""
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, outputs),
    )


class QueryEncoder(nn.Module):
    """A vector for each box, of its class, centre and scale, but not of its sides."""

    def __init__(self, num_classes: int, dim: int) -> None:
        """
        Args:
            num_classes: of the ground truth.
            dim: of the vectors, a multiple of 4.
        """
        super().__init__()
        self.num_classes, self.dim = num_classes, dim
        self.layers = mlp(num_classes + dim + 2 * NUM_SCALES, dim, dim)

    def forward(self, queries: Queries) -> Tensor:
        """(N, Q, D)."""
        scales = (queries.pixels.clamp(min=1e-6).log2() - 5).clamp(0, NUM_SCALES - 1).long()
        parts = [
            F.one_hot(queries.classes, self.num_classes).float(),
            sine_encoding(queries.centers, self.dim // 2),
            F.one_hot(scales, NUM_SCALES).float().flatten(-2),
        ]
        return self.layers(torch.cat(parts, dim=-1))


class Decoder(nn.Module):
    """One layer of cross-attention, as in a Transformer, without attention between the boxes."""

    def __init__(self, channels: int, dim: int, heads: int, hidden: int) -> None:
        """
        Args:
            channels: of the cells.
            dim: D.
            heads: h, of which D is a multiple.
            hidden: width of the two layers after the attention.
        """
        super().__init__()
        self.heads = heads
        self.position = nn.Linear(dim, channels)
        self.query, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.key, self.value = nn.Linear(channels, dim), nn.Linear(channels, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        for layer in (self.query, self.key, self.value):
            start_as_attention(layer)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, queries: Tensor, cells: Tensor, positions: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            queries: (N, Q, D).
            cells: (N, S, C).
            positions: (N, S, D), encoded.
            mask: (N, S) bool, True where a cell is valid; None: all are.

        Returns:
            the decoded boxes (N, Q, D); the attention (N, h, Q, S), which sums to 1 over the cells;
            and the values (N, S, h, D / h).
        """
        query = self.query(queries).unflatten(-1, (self.heads, -1))
        key = self.key(cells + self.position(positions)).unflatten(-1, (self.heads, -1))
        value = self.value(cells).unflatten(-1, (self.heads, -1))
        logits = torch.einsum("nqhd,nshd->nhqs", query / query.shape[-1] ** 0.5, key)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None], -math.inf)
        attention = logits.softmax(dim=-1)
        attended = torch.einsum("nhqs,nshd->nqhd", attention, value).flatten(-2)
        found = self.norm1(queries + self.out(attended))
        return self.norm2(found + self.feed_forward(found)), attention, value


def start_as_attention(layer: nn.Linear) -> None:
    """As the projections of ``nn.MultiheadAttention`` begin: one matrix holds all three."""
    nn.init.xavier_uniform_(layer.weight, gain=0.5**0.5)
    nn.init.zeros_(layer.bias)
