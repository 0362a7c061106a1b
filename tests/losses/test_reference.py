"""The reference size of summed losses."""

import pytest

from ssim_kd.losses import reference_size


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
