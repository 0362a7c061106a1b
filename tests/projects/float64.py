"""Layers in float64, by numpy: the formulas of the methods are written with these."""

from __future__ import annotations

from typing import Any

import numpy as np


def cells(x: np.ndarray) -> np.ndarray:
    """The cells (P, C) of a map (C, H, W), row by row."""
    return x.reshape(len(x), -1).T


def softmax(x: np.ndarray, axis: int = 0) -> np.ndarray:
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def number(parameter: Any) -> np.ndarray:
    return parameter.detach().double().numpy()


def affine(layer: Any, x: np.ndarray) -> np.ndarray:
    """A linear layer, or a 1x1 convolution, of rows (..., C)."""
    out = x @ number(layer.weight.flatten(1)).T
    return out if layer.bias is None else out + number(layer.bias)


def convolved(layer: Any, x: np.ndarray) -> np.ndarray:
    """A convolution of (C, H, W) with zeros beyond it."""
    weight, (height, width) = number(layer.weight), x.shape[1:]
    r = weight.shape[2] // 2
    x = np.pad(x, ((0, 0), (r, r), (r, r)))
    out = sum(
        np.einsum("oc,chw->ohw", weight[:, :, i, j], x[:, i : i + height, j : j + width])
        for i in range(2 * r + 1)
        for j in range(2 * r + 1)
    )
    return out if layer.bias is None else out + number(layer.bias)[:, None, None]


def normed(layer: Any, x: np.ndarray, axis: int = 0) -> np.ndarray:
    """Rows (..., C) at mean 0 and variance 1 along an axis: batch norm at 0, layer norm at -1."""
    x = x - x.mean(axis, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis, keepdims=True) + 1e-5)
    if layer is None:
        return x
    return x * number(layer.weight).ravel() + number(layer.bias).ravel()


def attention(x: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """The spatial and the channel attention of the cells (P, C) of an image."""
    spatial = len(x) * softmax(abs(x).mean(1) / temperature)
    return spatial, x.shape[1] * softmax(abs(x).mean(0) / temperature)


def images_of(rows: np.ndarray, counts: list[int]) -> list[np.ndarray]:
    """Rows of all images, by image."""
    return np.split(rows, np.cumsum(counts)[:-1])


def norm(rows: Any) -> float:
    """The root of the sum of squares."""
    return float(np.sqrt(sum((np.asarray(x) ** 2).sum() for x in rows)))
