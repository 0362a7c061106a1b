"""Draws one image of the digits data set: digits and distractors on a background, with boxes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .backdrop import blur_matrix, render_backdrop
from .glyphs import CELLS, MARGIN, GlyphSet, load_glyphs, spline_of
from .random_stream import Stream
from .scene import SPLITS, Scene

# At difficulty 1: rotation in degrees (+-), shear (+-), greatest hidden share of a digit.
MAX_ROTATION, MAX_SHEAR, MAX_OCCLUSION = 25.0, 0.25, 0.3
# Attempts at a place for a glyph before it is made smaller, and the factor by which it then is.
ATTEMPTS, SHRINK = 12, 0.75
# Ink coverage at which the edge of a stroke is drawn.
EDGE = 0.5


@dataclass(frozen=True)
class Digit:
    """A drawn digit.

    Attributes:
        label: in [0, 9].
        glyph: its position in ``load_digits().images``.
        box: (x, y, width, height) in pixels, tight around the whole digit, hidden parts included.
        area: pixels of the whole digit.
        mask: (height, width) bool, the whole digit within its box.
        hidden: share of the digit that others cover, in [0, MAX_OCCLUSION * difficulty].
    """

    label: int
    glyph: int
    box: tuple[int, int, int, int]
    area: int
    mask: NDArray[np.bool_]
    hidden: float


@dataclass(frozen=True)
class _Item:
    """A glyph to be placed: its spline, and its position in the set (-1: a distractor)."""

    spline: NDArray[np.float64]
    position: int


def render_image(scene: Scene, split: str, index: int) -> tuple[NDArray[np.uint8], list[Digit]]:
    """Draw one image.

    It depends only on the scene, the split and the index, not on how many images there are.

    Args:
        scene: what to draw.
        split: "train", "val" or "test": which glyphs are used.
        index: number of the image, >= 0.

    Returns:
        the image, (S, S, 3) uint8 RGB, and its digits, at least one.
    """
    stream = Stream(scene.seed, SPLITS.index(split), index)
    canvas = _Canvas(scene, render_backdrop(stream, scene.image_size, scene.difficulty))
    glyphs = load_glyphs(split)
    items = _choose_items(stream, scene, glyphs)
    for item in items:
        canvas.place(stream, item)
    return _photograph(stream, scene, canvas.image), canvas.digits(glyphs)


def _choose_items(stream: Stream, scene: Scene, glyphs: GlyphSet) -> list[_Item]:
    items = []
    for _ in range(stream.integer(*scene.digits_per_image)):
        position = stream.integer(0, len(glyphs) - 1)
        items.append(_Item(glyphs.spline[position], position))
    for _ in range(round(stream.uniform(0, 5) * scene.difficulty)):
        ink = glyphs.ink[stream.integer(0, len(glyphs) - 1)]
        items.append(_Item(spline_of(_shuffle_patches(stream, ink)), -1))
    return [items[i] for i in stream.permutation(len(items))]


def _shuffle_patches(stream: Stream, ink: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cut a glyph into 4 x 4 patches of two cells each and put them in another order."""
    inner = ink[MARGIN:-MARGIN, MARGIN:-MARGIN]
    patches = inner.reshape(4, 2, 4, 2).transpose(0, 2, 1, 3).reshape(16, 2, 2)
    grid = patches[stream.permutation(16)].reshape(4, 4, 2, 2)
    return np.pad(grid.transpose(0, 2, 1, 3).reshape(CELLS, CELLS), MARGIN)


def _warp(stream: Stream, item: _Item, size: float, difficulty: float) -> NDArray[np.float32]:
    """Return the opacity of a rotated and sheared glyph of a height, cropped to its ink."""
    turn = np.deg2rad(stream.uniform(-MAX_ROTATION, MAX_ROTATION) * difficulty)
    shear = stream.uniform(-MAX_SHEAR, MAX_SHEAR) * difficulty
    stretch = 1.0 + stream.uniform(-0.15, 0.15) * difficulty
    scale = size / CELLS
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    inverse = np.linalg.inv(scale * turned @ np.array([[1.0, 0.0], [shear, stretch]]))
    side = int(np.ceil(1.6 * size)) + 2
    centre = np.full(2, (CELLS - 1) / 2 + MARGIN)
    ink = ndimage.affine_transform(
        item.spline,
        inverse,
        offset=centre - inverse @ np.full(2, (side - 1) / 2),
        output_shape=(side, side),
        order=3,
        prefilter=False,
    )
    # The edge is about one pixel wide at every size.
    opacity = np.clip((ink - EDGE) * max(scale * 0.9, 1.6) + 0.5, 0.0, 1.0).astype(np.float32)
    rows, columns = np.flatnonzero(opacity.max(1) >= 0.5), np.flatnonzero(opacity.max(0) >= 0.5)
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


class _Canvas:
    """An image being painted, which knows whose every pixel is."""

    def __init__(self, scene: Scene, image: NDArray[np.float32]) -> None:
        self.scene = scene
        self.image = image
        self._owner = np.full(image.shape[:2], -1, dtype=np.int64)
        self._items: list[_Item] = []
        self._masks: list[NDArray[np.bool_]] = []
        self._corners: list[tuple[int, int]] = []
        # Of each item: pixels seen, and how many must stay so (distractors may vanish).
        self._visible = np.zeros(0, dtype=np.int64)
        self._least_visible = np.zeros(0)

    def place(self, stream: Stream, item: _Item) -> None:
        """Paint a glyph that hides no digit beyond the limit; smaller if there is no room.

        It is left out where even its smallest form finds no room, unless it is the first.
        """
        low, high = self.scene.digit_size
        size = stream.log_uniform(low, high)
        while True:
            opacity = _warp(stream, item, size, self.scene.difficulty)
            mask = opacity >= 0.5
            room_y, room_x = (self.scene.image_size - side for side in opacity.shape)
            for _ in range(ATTEMPTS if min(room_y, room_x) >= 0 else 0):
                y, x = stream.integer(0, room_y), stream.integer(0, room_x)
                if self._fits(mask, y, x):
                    self._paint(stream, item, opacity, mask, y, x)
                    return
            if size <= low:
                return
            size = max(size * SHRINK, low)

    def _fits(self, mask: NDArray[np.bool_], y: int, x: int) -> bool:
        window = self._owner[y : y + mask.shape[0], x : x + mask.shape[1]]
        if self.scene.difficulty <= 0:  # clean: not even the boxes touch
            return not (window >= 0).any()
        left = self._visible - self._pixels_of_each(window[mask])
        return not (left < self._least_visible).any()

    def _pixels_of_each(self, owners: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count the pixels that belong to each item."""
        return np.bincount(owners + 1, minlength=len(self._items) + 1)[1:]

    def _paint(
        self,
        stream: Stream,
        item: _Item,
        opacity: NDArray[np.float32],
        mask: NDArray[np.bool_],
        y: int,
        x: int,
    ) -> None:
        window = (slice(y, y + mask.shape[0]), slice(x, x + mask.shape[1]))
        behind = self.image[window]
        difficulty = self.scene.difficulty
        colour = _ink_colour(stream, behind[mask].mean(axis=0), difficulty)
        behind += opacity[..., None] * (colour - behind)
        area = int(mask.sum())
        hidden = self._pixels_of_each(self._owner[window][mask])
        self._visible = np.append(self._visible - hidden, area)
        least = (1 - MAX_OCCLUSION * difficulty) * area if item.position >= 0 else 0.0
        self._least_visible = np.append(self._least_visible, least)
        self._owner[window][mask] = len(self._items)
        self._items.append(item)
        self._masks.append(mask)
        self._corners.append((y, x))

    def digits(self, glyphs: GlyphSet) -> list[Digit]:
        """Return the digits painted so far, in the order of painting."""
        found = []
        for i, item in enumerate(self._items):
            if item.position < 0:
                continue
            (y, x), mask = self._corners[i], self._masks[i]
            area = int(mask.sum())
            label, glyph = int(glyphs.label[item.position]), int(glyphs.index[item.position])
            box = (x, y, mask.shape[1], mask.shape[0])
            found.append(Digit(label, glyph, box, area, mask, 1 - int(self._visible[i]) / area))
        return found


def _ink_colour(
    stream: Stream, behind: NDArray[np.float32], difficulty: float
) -> NDArray[np.float32]:
    """Return a colour that stands out from the mean colour behind it, less so when difficult."""
    colour = 255.0 * stream.uniforms(3)
    least = stream.uniform(90.0 - 55.0 * min(difficulty, 1.5), 120.0)
    brighter = float(behind.mean()) < 127.5
    if stream.unit() < 0.3:  # now and then against the nearer end, for variety
        brighter = not brighter if 60 < float(behind.mean()) < 195 else brighter
    wanted = float(behind.mean()) + (least if brighter else -least)
    lack = wanted - float(colour.mean())
    if (lack > 0) == brighter:
        colour = colour + np.float32(lack)
    return np.clip(colour, 0, 255).astype(np.float32)


def _photograph(stream: Stream, scene: Scene, image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Blur, change contrast and brightness, add noise, round."""
    difficulty = scene.difficulty
    if difficulty > 0:
        tenths = round(stream.uniform(0, 12) * difficulty)
        if tenths >= 3:
            matrix = blur_matrix(scene.image_size, tenths)
            planes = matrix @ np.ascontiguousarray(image.transpose(2, 0, 1)) @ matrix.T
            image = planes.transpose(1, 2, 0)
        contrast = 1.0 + stream.uniform(-0.35, 0.15) * difficulty
        shift = stream.uniform(-25, 25) * difficulty
        spread = stream.uniform(0, 14) * difficulty
        image = (image - np.float32(127.5)) * np.float32(contrast) + np.float32(127.5 + shift)
        image = image + np.float32(spread) * stream.bells(*image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
