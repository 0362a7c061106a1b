"""Glyphs of scikit-learn: their split."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from ssim_kd.data.digits.glyphs import GLYPHS_PER_SPLIT, load_glyphs
from ssim_kd.data.digits.scene import SPLITS


def test_load_glyphs_splits_are_disjoint_and_proportional():
    sets = [load_glyphs(split) for split in SPLITS]
    assert tuple(len(s) for s in sets) == GLYPHS_PER_SPLIT
    index = np.concatenate([s.index for s in sets])
    assert len(np.unique(index)) == len(index) == 1797
    pixels = load_digits().images.reshape(1797, -1)
    owner = {}
    for number, glyphs in enumerate(sets):
        for i in glyphs.index:  # nor does a copy of a glyph
            assert owner.setdefault(pixels[i].tobytes(), number) == number
    share = [np.bincount(s.label, minlength=10) / len(s) for s in sets]
    assert np.ptp(share, axis=0).max() < 0.01


def test_load_glyphs_unknown_split():
    with pytest.raises(ValueError, match=r"'tset'.*train, val, test"):
        load_glyphs("tset")
