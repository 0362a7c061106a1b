"""Ground-truth boxes on a level: cells by hand, by loops, and in a padded image."""

import math

import pytest
import torch

from ssim_kd.losses import (
    background_weights,
    box_cells,
    covered_cells,
    foreground_weights,
    has_area,
    roi_crops,
)

BOXES = torch.tensor(
    [
        [0.0, 0.0, 8.0, 16.0],  # columns 0-1, rows 0-2: 6 cells
        [9.0, 9.0, 15.0, 15.0],  # within cell (1, 1) and to its end: columns and rows 1-2
        [30.0, 2.0, 99.0, 7.0],  # beyond the map at the right
        [8.0, 8.0, 8.0, 24.0],  # no width
        [70.0, 70.0, 90.0, 90.0],  # beyond the map
    ]
)


def loops(boxes, height, width, stride):
    """foreground_weights of one image, cell by cell."""
    found = [[0.0] * width for _ in range(height)]
    for x0, y0, x1, y1 in boxes.tolist():
        if x1 <= x0 or y1 <= y0:
            continue
        left, top = math.floor(x0 / stride), math.floor(y0 / stride)
        right, bottom = math.ceil(x1 / stride), math.ceil(y1 / stride)
        share = 1 / ((bottom - top + 1) * (right - left + 1))
        for row in range(top, min(bottom, height - 1) + 1):
            for column in range(left, min(right, width - 1) + 1):
                found[row][column] = max(found[row][column], share)
    return torch.tensor(found)


def test_box_cells_by_hand():
    first, last = box_cells(BOXES[:3], 8)
    assert first.tolist() == [[0, 0], [1, 1], [3, 0]]
    assert last.tolist() == [[1, 2], [2, 2], [13, 1]]


def test_covered_cells_by_hand():
    found = covered_cells(BOXES, 4, 5, 8)
    assert found.shape == (5, 4, 5) and found.dtype == torch.bool
    assert found.sum(dim=(1, 2)).tolist() == [6, 4, 4, 0, 0]
    assert found[2].nonzero().tolist() == [[0, 3], [0, 4], [1, 3], [1, 4]]


@pytest.mark.parametrize("stride", [4, 8, 128])
@pytest.mark.parametrize("size", [(4, 5), (1, 1), (9, 7)])
def test_foreground_weights_are_the_formula_by_loops(size, stride):
    random = torch.rand(20, 4) * 60
    random = torch.cat([random[:, :2], random[:, :2] + random[:, 2:]], dim=1)
    images = [BOXES, BOXES[:0], random]
    found = foreground_weights(images, *size, stride)
    expected = torch.stack([loops(boxes, *size, stride) for boxes in images])
    torch.testing.assert_close(found, expected)


def test_foreground_weights_by_hand():
    found = foreground_weights([BOXES[:2]], 4, 4, 8)
    # The smaller box wins if both are.
    sixth, fourth = 1 / 6, 1 / 4
    expected = [[sixth, sixth, 0, 0], [sixth, fourth, fourth, 0], [sixth, fourth, fourth, 0]]
    torch.testing.assert_close(found, torch.tensor([[*expected, [0, 0, 0, 0]]]))


def test_foreground_weights_do_not_depend_on_the_padding():
    # The image has 32 x 24 pixels, whatever the size of its map.
    boxes = [torch.tensor([[4.0, 4.0, 20.0, 15.0]])]
    small, large = foreground_weights(boxes, 3, 4, 8), foreground_weights(boxes, 12, 16, 8)
    assert torch.equal(large[:, :3, :4], small)
    assert (large > 0).sum() == (small > 0).sum() == 12


@pytest.mark.parametrize("boxes", [BOXES[:0], BOXES[3:4], BOXES[4:]], ids=["none", "flat", "off"])
def test_background_weights_where_there_is_no_box(boxes):
    foreground = foreground_weights([boxes], 2, 3, 8)
    assert not foreground.any()
    torch.testing.assert_close(background_weights(foreground), torch.full((1, 2, 3), 1 / 6))


def test_background_weights_in_padding_and_where_boxes_cover_all():
    mask = torch.ones(2, 2, 3, dtype=torch.bool)
    mask[0, :, 2] = False
    boxes = [torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 99.0, 99.0]])]
    foreground = foreground_weights(boxes, 2, 3, 64, mask=mask)
    assert foreground[0].tolist() == [[0.25, 0.25, 0], [0.25, 0.25, 0]]
    # Both images are covered, except the padding of the first.
    assert not background_weights(foreground, mask).any()
    assert background_weights(foreground)[0].tolist() == [[0, 0, 0.5], [0, 0, 0.5]]
    boxes = [BOXES[:0], BOXES[:0]]
    found = background_weights(foreground_weights(boxes, 2, 3, 8, mask=mask), mask)
    assert found[0].tolist() == [[0.25, 0.25, 0], [0.25, 0.25, 0]]
    assert found.sum(dim=(1, 2)).tolist() == [1, pytest.approx(1)]


def test_has_area():
    assert has_area(BOXES).tolist() == [True, True, True, False, True]


def bilinear(plane, y, x):
    """A plane at a place between the centres of its cells; its border is continued by one cell."""
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = (min(max(v, 0.0), n - 1) for v, n in ((y, height), (x, width)))
    total = 0.0
    for row in {math.floor(y), math.ceil(y)}:
        for column in {math.floor(x), math.ceil(x)}:
            share = (1 - abs(y - row)) * (1 - abs(x - column))
            total += share * float(plane[row, column])
    return total


def crop(plane, box, stride, size):
    """RoIAlign of one box in one channel, sample by sample."""
    x0, y0, x1, y1 = (v / stride - 0.5 for v in box)
    across, down = (x1 - x0) / size, (y1 - y0) / size
    columns, rows = math.ceil(across), math.ceil(down)
    found = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            for a in range(rows):
                for b in range(columns):
                    y = y0 + down * (i + (a + 0.5) / rows)
                    x = x0 + across * (j + (b + 0.5) / columns)
                    found[i, j] += bilinear(plane, y, x) / (rows * columns)
    return found


@pytest.mark.parametrize("stride", [4, 16])
def test_roi_crops_are_roi_align_by_loops(stride):
    maps = torch.randn(3, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    images = [BOXES, BOXES[:0], BOXES[:2] * 1.7 + 3]
    found = roi_crops(maps, images, stride, 3)
    assert [len(crops) for crops in found] == [4, 0, 2]
    for image, crops in enumerate(found):
        kept = [box for box in images[image].tolist() if box[0] < box[2] and box[1] < box[3]]
        for box, of_box in zip(kept, crops, strict=True):
            expected = [crop(plane, box, stride, 3) for plane in maps[image].detach()]
            torch.testing.assert_close(of_box.detach(), torch.stack(expected))
    sum(crops.sum() for crops in found).backward()
    assert maps.grad[0].any() and not maps.grad[1].any()


@pytest.mark.parametrize("boxes", [BOXES[:0], BOXES[3:4]], ids=["none", "flat"])
def test_roi_crops_without_boxes_keep_a_gradient(boxes):
    maps = torch.randn(1, 2, 1, 1, requires_grad=True)
    (crops,) = roi_crops(maps, [boxes], 128, 3)
    assert crops.shape == (0, 2, 3, 3)
    crops.sum().backward()
    assert not maps.grad.any()


def test_roi_crops_of_half_precision_are_float32():
    maps = torch.randn(1, 2, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = roi_crops(maps, [BOXES[:1]], 8, 2)
    (expected,) = roi_crops(maps.float(), [BOXES[:1]], 8, 2)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
