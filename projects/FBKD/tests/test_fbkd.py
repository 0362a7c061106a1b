"""FBKD: attention-guided features, pooled features, and non-local relations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ssim_kd.modeling import DistillBatch
from ssim_kd.projects.fbkd import FBKDDistiller
from tests.level_maps import bind, maps_of
from tests.projects.float64 import affine, attention, cells, convolved, images_of, norm, normed
from tests.projects.maps import MethodOfMaps


def non_local(block, images: list[np.ndarray]) -> list[np.ndarray]:
    """The block: the cells of each image."""
    found, side = [], block.stride
    for x in images:
        _, height, width = x.shape
        key, value = (
            np.stack(
                [
                    affine(layer, cells(x[:, i : i + side, j : j + side])).max(0)
                    for i in range(0, height, side)
                    for j in range(0, width, side)
                ]
            )
            for layer in (block.key, block.value)
        )
        mixed = affine(block.query, cells(x)) @ key.T @ value / len(key)
        found.append(affine(block.out, mixed))
    added = images_of(normed(block.norm, np.concatenate(found)), [len(x) for x in found])
    return [cells(x) + y for x, y in zip(images, added, strict=True)]


class TestFBKD(MethodOfMaps):
    method = FBKDDistiller
    options = {"inner_channels": [2] * 4, "pool_strides": [2] * 4, "temperature": 0.3}
    bad = [
        ("part_weights.feature", -1.0, "FBKD.FEATURE_WEIGHT"),
        ("part_weights.nonlocal", math.nan, "FBKD.NONLOCAL_WEIGHT"),
        ("temperature", 0.0, "FBKD.TEMPERATURE"),
        ("reference", [2, 800], "FBKD.REFERENCE"),
        ("pool_strides", [0], "FBKD.POOL_STRIDES"),
        ("inner_channels", [1.5], "FBKD.INNER_CHANNELS"),
    ]
    at_rest = True
    growth = {
        "feature": math.sqrt(2 * 3 * 4),
        "channel": math.sqrt(2 * 3),
        "spatial": math.sqrt(2 * 4),
        "nonlocal": math.sqrt(2 * 3 * 4),
    }

    def rest(self, distiller) -> None:
        # The non-local blocks begin as the identity.
        for level in distiller.levels:
            for name in ("channel_maps", "nonlocal_maps", "feature_maps", "spatial_maps"):
                layer = getattr(distiller, name)[level]
                start = torch.nn.init.eye_ if layer.weight.dim() == 2 else torch.nn.init.dirac_
                start(layer.weight)
                torch.nn.init.zeros_(layer.bias)

    def test_by_hand(self) -> None:
        # T - S = 2 in each of 4 channels and 20 cells of 2 images. Flat maps: attention is 1.
        distiller = bind(FBKDDistiller(), 4)
        self.rest(distiller)
        student = torch.ones(2, 4, 4, 5)
        found = distiller.level_loss(maps_of(student, 3 * student), DistillBatch([(32, 40)] * 2))
        counts = {"feature": 2 * 4 * 20, "channel": 2 * 4, "spatial": 2 * 20, "nonlocal": 160}
        expected = {part: 2 * math.sqrt(count) for part, count in counts.items()}
        assert {k: v.item() for k, v in found.items()} == pytest.approx(expected)

    def level_formula(self, distiller, level, student, teacher, batch):
        feature, channel, spatial = [], [], []
        for s, t in zip(student, teacher, strict=True):
            a, (ours, by_channel), (theirs, weights) = (
                affine(distiller.feature_maps[level], cells(s)),
                attention(cells(s), distiller.temperature),
                attention(cells(t), distiller.temperature),
            )
            if distiller.channel_attention:
                _, by_channel = attention(a, distiller.temperature)
                weights = (by_channel + weights) / 2
            else:
                weights = np.ones(len(t))
            root = np.sqrt((ours + theirs)[:, None] / 2 * weights)
            feature.append(root * (cells(t) - a))
            means = affine(distiller.channel_maps[level], s.mean((1, 2)))
            channel.append(t.mean((1, 2)) - means)
            plane = convolved(distiller.spatial_maps[level], s.mean(0)[None])
            spatial.append(t.mean(0) - plane[0])
        ours, theirs = (
            non_local(getattr(distiller, f"{whose}_nonlocal")[level], images)
            for whose, images in (("student", student), ("teacher", teacher))
        )
        layer = distiller.nonlocal_maps[level]
        relation = [t - affine(layer, s) for s, t in zip(ours, theirs, strict=True)]
        parts = {"feature": feature, "channel": channel, "spatial": spatial, "nonlocal": relation}
        return {part: norm(rows) for part, rows in parts.items()}

    def test_the_formula_of_dense_detectors(self) -> None:
        """Which weight the channels as well."""
        self.options = {**self.options, "channel_attention": True}
        self.test_the_formula_in_float64((33, 40))


def test_channel_attention_is_of_the_students_own_map_where_channels_are_equal() -> None:
    student, teacher = torch.randn(2, 4, 4, 5), torch.randn(2, 4, 4, 5)
    distiller = bind(FBKDDistiller(channel_attention=True), 4)
    weights = distiller._attention(student, torch.full_like(student, 1e3), teacher, None)
    torch.testing.assert_close(weights, distiller._attention(student, student, teacher, None))
    assert not weights.requires_grad
