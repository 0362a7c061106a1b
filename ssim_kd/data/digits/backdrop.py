"""Backgrounds of the rendered images: a plain colour, noise of several octaves, gratings."""

import functools

import numpy as np
from numpy.typing import NDArray

from .random_stream import Stream

Image = NDArray[np.float32]

# Control points a side of each octave of noise, coarse to fine, and how much weaker each is.
OCTAVES = (3, 6, 12, 24, 48)
DECAY = 0.62


def render_backdrop(stream: Stream, size: int, difficulty: float) -> Image:
    """Return a background.

    Args:
        stream: source of the random numbers.
        size: side in pixels.
        difficulty: >= 0. 0 gives a plain colour; it scales noise and gratings.

    Returns:
        (size, size, 3) float32, RGB, about in [0, 255] but not clipped.
    """
    base = 50.0 + 155.0 * stream.uniforms(3)
    image = np.broadcast_to(base, (size, size, 3)).astype(np.float32)
    if difficulty <= 0:
        return image
    image += _octaves(stream, size, difficulty * stream.uniform(12.0, 42.0))
    for _ in range(stream.integer(0, 2)):
        image += _grating(stream, size, difficulty * stream.uniform(6.0, 26.0))
    return image


def _octaves(stream: Stream, size: int, amplitude: float) -> Image:
    """Noise with a bit of colour: common brightness, and a weaker part for each channel."""
    rows, columns = [], []
    for octave, points in enumerate(OCTAVES):
        weights = _interpolation(points, size)
        grey, coloured = stream.bells(1, points, points), stream.bells(3, points, points)
        knots = np.float32(DECAY**octave) * (grey + np.float32(0.4) * coloured)
        rows.append(weights @ knots)
        columns.append(weights)
    fields = np.concatenate(rows, axis=2) @ np.concatenate(columns, axis=1).T
    return np.float32(amplitude) * fields.transpose(1, 2, 0)


def _grating(stream: Stream, size: int, amplitude: float) -> Image:
    """Stripes of one direction and colour that fade out away from a random point."""
    angle = stream.uniform(0.0, np.pi)
    period = stream.log_uniform(5.0, 40.0)
    spread = stream.uniform(0.15, 0.6) * size
    at_y, at_x = stream.uniform(0, size), stream.uniform(0, size)
    y = np.arange(size, dtype=np.float32)[:, None] - np.float32(at_y)
    x = np.arange(size, dtype=np.float32)[None, :] - np.float32(at_x)
    pace = 2 * np.pi / period
    phase = np.float32(pace * np.cos(angle)) * x + np.float32(pace * np.sin(angle)) * y
    fade = np.float32(-0.5 / spread**2)
    wave = np.sin(phase) * np.exp(fade * y**2) * np.exp(fade * x**2)
    colour = np.float32(amplitude) * (np.float32(0.5) + stream.uniforms(3))
    return wave[..., None] * colour


@functools.lru_cache(maxsize=32)
def _interpolation(points: int, size: int) -> NDArray[np.float32]:
    """Matrix (size, points) that draws a smooth curve through control points, C1 everywhere."""
    position = np.linspace(0, points - 1, size)
    left = np.minimum(position.astype(int), points - 2)
    step = position - left
    step = step * step * (3 - 2 * step)
    weights = np.zeros((size, points), dtype=np.float32)
    weights[np.arange(size), left] = 1 - step
    weights[np.arange(size), left + 1] = step
    return weights


@functools.lru_cache(maxsize=64)
def blur_matrix(size: int, sigma_tenths: int) -> NDArray[np.float32]:
    """Matrix (size, size) that blurs a column with a Gaussian of sigma_tenths / 10 pixels.

    Its rows add up to 1, at the border as well. Blurring by two matrix products is quick at these
    sizes and the same on every version of every library.
    """
    offset = np.arange(size)[:, None] - np.arange(size)[None, :]
    weights = np.exp(-0.5 * (offset / max(sigma_tenths / 10, 1e-3)) ** 2)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
