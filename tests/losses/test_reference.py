"""The reference size of summed losses."""

import pytest
import torch

from ssim_kd.losses import norm_scales, reference_size


def test_reference_size_of_cells():
    found = reference_size("KEY", [2, 800, 1088, 256])
    assert found is not None
    assert (found.images, found.channels) == (2, 256)
    assert [found.cells(stride) for stride in (4, 16, 128)] == [200 * 272, 50 * 68, 7 * 9]


def test_reference_size_of_none():
    assert reference_size("KEY", []) is None


@pytest.mark.parametrize(
    "bad", [[2, 800, 1088], [2, 800, 1088, 0], [2, 800, 1088.0, 256], [True] * 4]
)
def test_reference_size_of_other_values(bad):
    with pytest.raises(ValueError, match=r"MODEL\.KEY") as caught:
        reference_size("MODEL.KEY", bad)
    assert str(bad) in str(caught.value) and "[images, height, width, channels]" in str(
        caught.value
    )


def test_norm_scales_make_a_norm_that_of_the_reference():
    """Maps of ones: their norm over images, channels and cells is the root of their number."""
    reference = reference_size("KEY", [8, 64, 128, 12])
    maps, mask = torch.ones(2, 3, 4, 8), torch.ones(2, 1, 4, 8, dtype=torch.bool)
    mask[1, :, 2:] = False
    images, channels, cells = norm_scales(reference, maps, mask, 16)
    norm = torch.linalg.vector_norm(maps * mask)
    # 8 images of 12 channels; 4 x 8 cells of which all count.
    assert float(norm * images * channels * cells) == pytest.approx((8 * 12 * 32) ** 0.5)
    assert norm_scales(None, maps, mask, 16) == (1, 1, 1)
