"""Pictures: what is drawn, and that looking at a model leaves it as it was."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from ssim_kd import visualization
from ssim_kd.engine.hooks import VisualizeDistillation
from ssim_kd.modeling import DistillBatch, Tap
from ssim_kd.visualization import (
    PANELS,
    draw_detections,
    heatmap,
    loss_map_images,
    loss_maps,
    resize,
    to_rgb,
)
from tests.helpers import (
    TEACHER_FPN,
    build,
    distilled_config,
    make_batch,
    save_weights,
    stock_config,
    train_losses,
)

NAMES = ("zero", "one")
IMAGE = np.full((40, 60, 3), 127, dtype=np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    folder = tmp_path_factory.mktemp("teacher")
    weights = save_weights(stock_config("faster", fpn=TEACHER_FPN), folder / "teacher.pth")
    return build(distilled_config("faster", "faster", weights))


def detections(*scores: float) -> Instances:
    instances = Instances((40, 60))
    instances.pred_boxes = Boxes(torch.tensor([[5.0, 20.0, 25.0, 38.0]] * len(scores)))
    instances.pred_classes = torch.ones(len(scores), dtype=torch.int64)
    instances.scores = torch.tensor(scores)
    return instances


def test_detections_are_drawn_enlarged_and_the_input_is_kept() -> None:
    found = detections(0.9)
    picture = draw_detections(IMAGE, found, NAMES, scale=3.0)
    assert picture.shape == (120, 180, 3)
    assert picture.dtype == np.uint8
    left_edge = picture[70:110, 12:19].astype(int)
    assert (left_edge.max(axis=1) - left_edge.min(axis=1) > 50).any(axis=1).all()
    assert (picture[:, 120:] == 127).all()
    assert found.pred_boxes.tensor.tolist() == [[5.0, 20.0, 25.0, 38.0]]


def test_unsure_detections_are_left_out() -> None:
    nothing = draw_detections(IMAGE, detections(), NAMES)
    assert (draw_detections(IMAGE, detections(0.3), NAMES) == nothing).all()
    assert (draw_detections(IMAGE, detections(0.3), NAMES, min_score=0.2) != nothing).any()


def test_ground_truth_is_drawn() -> None:
    truth = Instances((40, 60))
    truth.gt_boxes = Boxes(torch.tensor([[5.0, 20.0, 25.0, 38.0]]))
    truth.gt_classes = torch.tensor([0])
    assert (draw_detections(IMAGE, truth, NAMES) != IMAGE).any()


def test_heatmap_has_sharp_cells_and_grey_holes() -> None:
    values = torch.tensor([[0.0, 0.5], [2.0, float("nan")]])
    picture = heatmap(values, 8, 12, colours="gray")
    assert picture.shape == (8, 12, 3)
    assert (picture[:4, :6] == 0).all()
    assert (picture[:4, 6:] == 255).all()
    assert (picture[4:, :6] == 255).all()
    assert (picture[4:, 6:] == 127).all() or (picture[4:, 6:] == 128).all()


def test_heatmap_runs_backwards_where_the_limits_do() -> None:
    picture = heatmap(torch.tensor([[1.0, 0.0]]), 1, 2, limits=(1.0, 0.0), colours="gray")
    assert picture[0, :, 0].tolist() == [0, 255]


def test_to_rgb_swaps_bgr_alone() -> None:
    image = torch.tensor([10.0, 20.0, 300.0]).reshape(3, 1, 1)
    assert to_rgb(image, "BGR")[0, 0].tolist() == [255, 20, 10]
    assert to_rgb(image, "RGB")[0, 0].tolist() == [10, 20, 255]


def test_resize() -> None:
    assert resize(IMAGE, 10, 20).shape == (10, 20, 3)


def test_the_maps_are_what_the_loss_averages(model: nn.Module) -> None:
    batch = make_batch()
    maps = loss_maps(model, batch)
    model.eval()
    distiller = model.distillers["ssim"]
    with torch.no_grad(), Tap(model.student, distiller.levels) as ours:
        model.student.backbone(model.student.preprocess_image(batch).tensor)
    theirs = model.load_teacher()([x["image"] for x in batch])
    with torch.no_grad():
        _, by_level = distiller(ours, theirs, DistillBatch.from_inputs(batch))
    assert list(maps) == distiller.levels
    for level, found in maps.items():
        mean = torch.stack([image.nanmean() for image in found.loss]).mean()
        torch.testing.assert_close(mean, by_level[level], rtol=1e-4, atol=1e-5)
        assert found.loss.shape == found.structure.shape == found.contrast.shape


def test_any_meta_architecture_is_shown(model: nn.Module, tmp_path) -> None:
    # A ProposalNetwork has no preprocess_image; a teacher of half the stride is resized.
    weights = save_weights(stock_config("dc5"), tmp_path / "dc5.pth")
    student = ("MODEL.DISTILL.STUDENT_META_ARCHITECTURE", "ProposalNetwork")
    level = ("MODEL.DISTILL.IN_FEATURES", ["res5"], "MODEL.DISTILL.RESIZE", "bilinear")
    cfg = distilled_config("faster", "dc5", weights, *student, *level)
    pictures = loss_map_images(build(cfg), make_batch(((200, 136),)))
    assert pictures["res5"].shape == (200, (1 + len(PANELS)) * 136, 3)


@pytest.mark.parametrize("scaling", ["sample", "batch", "none"])
def test_channels_in_groups_have_the_scaling_of_all(scaling, model, monkeypatch) -> None:
    options = model.distillers["ssim"].options
    monkeypatch.setitem(options, "scaling", None if scaling == "none" else scaling)
    expected = loss_maps(model, make_batch())
    monkeypatch.setattr(visualization, "CHANNELS_AT_ONCE", 7)
    for level, found in loss_maps(model, make_batch()).items():
        for name in ("loss", "luminance", "contrast", "structure"):
            torch.testing.assert_close(
                getattr(found, name), getattr(expected[level], name), equal_nan=True
            )


def test_padding_is_nan(model: nn.Module) -> None:
    found = loss_maps(model, make_batch(((96, 128), (64, 96))))["p2"]
    assert not found.loss[0].isnan().any()
    assert found.loss[1, 16:].isnan().all()
    assert not found.loss[1, :16, :24].isnan().any()


def test_looking_changes_nothing(model: nn.Module) -> None:
    model.train()
    model.student.backbone.bottom_up.stem.eval()
    modes = [module.training for module in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    loss_maps(model, make_batch())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not model.student.backbone._forward_hooks


def test_a_plain_student_has_no_loss_maps(model: nn.Module) -> None:
    plain = build(distilled_config("faster", "faster", "", "MODEL.DISTILL.ENABLED", False))
    with pytest.raises(ValueError, match="the model has no teacher"):
        loss_maps(plain, make_batch())


def test_pictures_by_level(model: nn.Module) -> None:
    pictures = loss_map_images(model, make_batch(((96, 128), (60, 90))))
    assert set(pictures) == set(model.distillers["ssim"].levels)
    for picture in pictures.values():
        assert picture.shape == (96 + 60, (1 + len(PANELS)) * 128, 3)
        assert picture.dtype == np.uint8


def test_the_hook_draws_every_period(model: nn.Module) -> None:
    hook = VisualizeDistillation(2, make_batch)
    hook.trainer = SimpleNamespace(iter=0, model=model)
    with EventStorage(0) as storage:
        hook.after_step()
        assert not storage._vis_data
        hook.trainer.iter = 1
        hook.after_step()
        names = {name for name, _, _ in storage._vis_data}
        assert names == {f"distill/{level}" for level in model.distillers["ssim"].levels}
        assert all(image.shape[0] == 3 for _, image, _ in storage._vis_data)
    train_losses(model)  # still trains
