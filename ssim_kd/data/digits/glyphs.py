"""The handwritten digits of scikit-learn, split once and for all into train, val and test."""

import functools
import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.datasets import load_digits

from .scene import SPLITS

# Number of glyphs of each split: all 1797 that scikit-learn ships.
GLYPHS_PER_SPLIT = (1000, 297, 500)
# Side of a glyph in cells, and the empty cells put around it so that splines fade out to zero.
CELLS, MARGIN = 8, 2


@dataclass(frozen=True)
class GlyphSet:
    """The glyphs of one split.

    Attributes:
        index: (K,) int64, positions in ``load_digits().images``.
        label: (K,) int64 in [0, 9].
        ink: (K, 12, 12) float64 in [0, 1]: coverage of each cell, with a margin of two cells.
        spline: (K, 12, 12) float64, coefficients of the cubic spline through ``ink``.
    """

    index: NDArray[np.int64]
    label: NDArray[np.int64]
    ink: NDArray[np.float64]
    spline: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.index)


def spline_of(ink: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the coefficients of the cubic spline through a (12, 12) map of ink."""
    return ndimage.spline_filter(ink, order=3, output=np.float64, mode="mirror")


@functools.cache
def load_glyphs(split: str) -> GlyphSet:
    """Return the glyphs of a split.

    The split is the same for every seed of the renderer, so that no glyph ever moves from one to
    another, and stratified: each class has its share of each split to within one glyph.

    Args:
        split: "train", "val" or "test".

    Raises:
        ValueError: the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}: expected one of {', '.join(SPLITS)}.")
    digits = load_digits()
    labels = np.asarray(digits.target, dtype=np.int64)
    order = _stratified_order(labels)
    ends = np.cumsum(GLYPHS_PER_SPLIT)
    if ends[-1] != len(labels):
        raise ValueError(f"scikit-learn's load_digits has {len(labels)} glyphs, not {ends[-1]}.")
    position = SPLITS.index(split)
    index = np.sort(order[ends[position] - GLYPHS_PER_SPLIT[position] : ends[position]])
    ink = np.asarray(digits.images, dtype=np.float64)[index] / 16.0
    ink = np.pad(ink, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)))
    return GlyphSet(index, labels[index], ink, np.stack([spline_of(glyph) for glyph in ink]))


def _stratified_order(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Order the glyphs so that any run of them has all classes in proportion, but else randomly."""
    shuffled = sorted(
        range(len(labels)), key=lambda i: hashlib.sha256(f"glyph {i}".encode()).digest()
    )
    counts = np.bincount(labels)
    seen = np.zeros_like(counts)
    place = np.empty(len(labels))
    for i in shuffled:
        label = labels[i]
        place[i] = (seen[label] + 0.5) / counts[label]
        seen[label] += 1
    return np.lexsort((labels, place)).astype(np.int64)
