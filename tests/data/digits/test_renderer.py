"""Rendered images: boxes, sizes, occlusion, and the same picture for the same key."""

from dataclasses import replace

import numpy as np
import pytest

from ssim_kd.data.digits.glyphs import load_glyphs
from ssim_kd.data.digits.renderer import MAX_OCCLUSION, render_image
from ssim_kd.data.digits.scene import SPLITS, Scene

SCENE = Scene(
    seed=3, image_size=64, digits_per_image=(2, 5), digit_size=(14.0, 30.0), difficulty=1.0
)

# (label, glyph, box, area)
GOLDEN_DIGITS = [(1, 346, (4, 26, 14, 21), 145), (1, 1386, (36, 25, 9, 16), 75)]
GOLDEN_MEANS = [
    [103.4, 101.6, 119.5, 139.1],
    [124.8, 121.3, 114.0, 116.4],
    [124.6, 129.2, 124.9, 99.5],
    [130.5, 100.8, 105.2, 106.5],
]


@pytest.mark.parametrize("split", SPLITS)
def test_render_image_glyphs_of_its_split_alone(split):
    allowed = set(load_glyphs(split).index.tolist())
    used = {d.glyph for i in range(20) for d in render_image(SCENE, split, i)[1]}
    assert used and used <= allowed


# Boxes and labels are integers from raw random bits and double precision: exact on every version.
# Pixels may differ by rounding, so they are compared by coarse means.
def test_render_image_golden():
    image, digits = render_image(SCENE, "train", 0)
    assert [(d.label, d.glyph, d.box, d.area) for d in digits] == GOLDEN_DIGITS
    means = image.reshape(4, 16, 4, 16, 3).mean(axis=(1, 3, 4))
    np.testing.assert_allclose(means, GOLDEN_MEANS, atol=0.6)


def test_render_image_depends_on_its_key_alone():
    first = render_image(SCENE, "val", 4)[0]
    render_image(SCENE, "val", 5)
    np.testing.assert_array_equal(render_image(SCENE, "val", 4)[0], first)
    for other in (
        render_image(SCENE, "val", 5),
        render_image(SCENE, "test", 4),
        render_image(replace(SCENE, seed=4), "val", 4),
    ):
        assert (other[0] != first).any()


@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0, 2.0])
def test_render_image_boxes_counts_and_occlusion(difficulty):
    scene = replace(SCENE, difficulty=difficulty, image_size=96, digits_per_image=(2, 8))
    for index in range(25):
        image, digits = render_image(scene, "train", index)
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8
        assert 1 <= len(digits) <= 8
        for digit in digits:
            x, y, width, height = digit.box
            assert x >= 0 and y >= 0 and x + width <= 96 and y + height <= 96
            assert digit.mask.shape == (height, width) and digit.mask.sum() == digit.area
            edges = digit.mask[0], digit.mask[-1], digit.mask[:, 0], digit.mask[:, -1]
            assert all(edge.any() for edge in edges)  # tight
            assert 0 <= digit.hidden <= MAX_OCCLUSION * difficulty + 1e-9
            assert 7 <= height <= 60


def test_render_image_difficulty_zero_shows_the_masks():
    scene = replace(SCENE, difficulty=0.0)
    for index in range(10):
        image, digits = render_image(scene, "train", index)
        ground = image[0, 0] if not any(d.box[:2] == (0, 0) for d in digits) else image[-1, -1]
        strong = np.abs(image.astype(int) - ground).max(axis=2) > 0
        covered = np.zeros_like(strong)
        for digit in digits:
            x, y, width, height = digit.box
            window = strong[y : y + height, x : x + width]
            assert window[digit.mask].mean() > 0.99
            covered[y : y + height, x : x + width] = True
        # What is drawn outside the boxes is only the soft edge.
        assert not strong[~covered].any()


def test_render_image_sizes_are_log_uniform():
    scene = replace(SCENE, image_size=256, digit_size=(14, 96), difficulty=0.0)
    heights = [d.box[3] for i in range(60) for d in render_image(scene, "train", i)[1]]
    middle = np.median(heights)
    assert 25 < middle < 45 and min(heights) >= 12 and max(heights) <= 100
