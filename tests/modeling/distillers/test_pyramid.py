"""What all distillers of feature maps share: levels, weights, masks, and where gradients go."""

from __future__ import annotations

import itertools

import pytest
import torch
from detectron2.layers import ShapeSpec

from ssim_kd.losses import lp_loss, ssim_loss
from ssim_kd.modeling import PyramidDistiller
from tests.helpers import (
    TEACHER_FPN,
    bfloat16_without_onednn,
    build,
    distilled_config,
    gradients,
    make_batch,
    train_losses,
)
from tests.level_maps import FULL, PADDED, TWO, bind, features, make

LOSSES = ("ssim", "l1", "l2")
WEIGHTS = (0.5, 2.0)


@pytest.mark.parametrize("scaling", ["channel", "sample", "batch", "none"])
@pytest.mark.parametrize("batch", [FULL, PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("loss", LOSSES)
def test_forward_is_the_weighted_sum_of_the_levels(loss, batch, scaling) -> None:
    ssim = {"window_size": 5, "sigma": 1.0, "gamma": 2.0}
    own = {"ssim_options": ssim} if loss == "ssim" else {}
    distiller = make(loss, scaling=scaling, level_weights=WEIGHTS, **own)
    ours, theirs = features(seed=0), features(seed=1)
    total, by_level = distiller(ours, theirs, batch)

    raw = {}
    for level, stride in TWO.items():
        mask = batch.valid_mask(*ours[level].shape[-2:], stride)
        common = {"scaling": None if scaling == "none" else scaling, "mask": mask}
        pair = (ours[level], theirs[level])
        if loss == "ssim":
            raw[level] = ssim_loss(*pair, **common, **ssim)
        else:
            raw[level] = lp_loss(*pair, p=int(loss[1]), **common)
    torch.testing.assert_close(total, 0.5 * raw["p3"] + 2.0 * raw["p4"])
    assert list(by_level) == list(TWO) == list(distiller.scalar_weights)
    for level, value in by_level.items():
        torch.testing.assert_close(value, raw[level])
        assert not value.requires_grad


def test_forward_is_not_weighted_by_the_distillers_weight() -> None:
    ours, theirs = features(seed=0), features(seed=1)
    (light, _), (heavy, _) = (make(weight=w)(ours, theirs, FULL) for w in (1.0, 7.0))
    assert torch.equal(light, heavy) and light > 0


def test_forward_counts_padding_where_it_is_not_masked() -> None:
    ours, theirs = features(seed=0), features(seed=1)
    values = {}
    for masked, batch in itertools.product((True, False), (FULL, PADDED)):
        total, _ = make(mask_padding=masked)(ours, theirs, batch)
        values[masked, batch is PADDED] = float(total)
    assert values[False, True] == values[False, False] == values[True, False]
    assert values[True, True] != values[True, False]


def test_forward_with_a_level_of_weight_0_logs_it_and_does_nothing() -> None:
    ours = {level: value.requires_grad_() for level, value in features(seed=0).items()}
    total, by_level = make(level_weights=(1.0, 0.0))(ours, features(seed=1), FULL)
    total.backward()
    assert ours["p3"].grad.any() and not ours["p4"].grad.any()
    assert by_level["p4"] > 0


@pytest.mark.parametrize("batch", [FULL, PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("mask_padding", [True, False])
def test_align_gives_a_mask_of_padded_maps(batch, mask_padding) -> None:
    distiller = make(mask_padding=mask_padding)
    ours, theirs = features(seed=0), features(seed=1)
    maps = distiller.align("p3", ours["p3"], theirs["p3"], batch)
    masked = mask_padding and batch is PADDED
    assert maps.level == "p3"
    expected = batch.valid_mask(12, 16, 8)
    assert torch.equal(maps.mask, expected) if masked else maps.mask is None


def test_align_crops_maps_that_were_padded_unlike() -> None:
    distiller = make()
    theirs = features(seed=1)["p3"]
    maps = distiller.align("p3", features(seed=0)["p3"], theirs, FULL)
    cropped = distiller.align("p3", features(seed=0)["p3"][..., :11, :15], theirs, FULL)
    assert cropped.student.shape == cropped.teacher.shape == (2, 4, 11, 15)
    assert torch.equal(cropped.teacher, maps.teacher[..., :11, :15])


def test_align_without_adapters_gives_the_students_channels() -> None:
    class Own(PyramidDistiller):
        adapts = False

    # Not even "none" minds channels that differ.
    distiller = bind(Own(name="own", adapter="none"), 3, 4, TWO)
    maps = distiller.align("p3", features(seed=0, channels=3)["p3"], features(seed=1)["p3"], FULL)
    assert not distiller.adapters and (maps.student.shape[1], maps.teacher.shape[1]) == (3, 4)


def test_pyramid_loss_of_a_method_that_defines_nothing_names_it() -> None:
    class Empty(PyramidDistiller):
        pass

    with pytest.raises(NotImplementedError, match="Empty"):
        bind(Empty(name="empty"), 4, levels=TWO)(features(seed=0), features(seed=1), FULL)


def test_bind_shapes_of_unlike_strides_names_them() -> None:
    distiller, resized = PyramidDistiller(name="x"), PyramidDistiller(name="x", resize="bilinear")
    ours, halved = (
        {k: ShapeSpec(channels=4, stride=s) for k, s in strides.items()}
        for strides in (TWO, {"p3": 8, "p4": 8})
    )
    with pytest.raises(ValueError, match=r"'p4': \(16, 8\)") as caught:
        distiller.bind_shapes(ours, halved)
    assert "`resize`" in str(caught.value)
    resized.bind_shapes(ours, halved)
    assert (resized.strides["p4"], resized.teacher_strides["p4"]) == (16, 8)


# In a detector


def test_a_teacher_that_is_the_student_costs_nothing(tmp_path) -> None:
    opts = ("MODEL.FPN.OUT_CHANNELS", TEACHER_FPN, "MODEL.DISTILL.ADAPTER", "none")
    cfg = distilled_config("faster", "faster", "", *opts, "MODEL.DISTILL.ENABLED", False)
    student = build(cfg).student
    torch.save({"model": student.state_dict()}, tmp_path / "same.pth")
    cfg.MODEL.DISTILL.TEACHER.WEIGHTS = str(tmp_path / "same.pth")
    cfg.MODEL.DISTILL.ENABLED = True
    model = build(cfg)
    # The teacher's norms are in eval mode; the student's must be, to see the same.
    model.student.backbone.train = lambda mode=True: model.student.backbone
    model.student.backbone.eval()
    for module in model.student.backbone.modules():
        module.training = False
    losses = train_losses(model)
    assert abs(float(losses["loss_distill"].detach())) < 1e-4
    assert model.metrics and all(float(v) < 1e-5 for v in model.metrics.values())


@pytest.mark.parametrize("kind", ["faster", "retinanet"])
def test_bfloat16_on_a_cpu(kind, weights_of) -> None:
    # Emulated on most CPUs, thus slow: one small image.
    batch = make_batch(((64, 64),))
    cfg = distilled_config(
        kind, "cascade", weights_of("cascade"), "MODEL.DISTILL.IN_FEATURES", ["p3", "p4"]
    )
    model = build(cfg)
    expected = {k: float(v.detach()) for k, v in train_losses(model, batch).items()}
    with bfloat16_without_onednn():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = train_losses(model, batch)
        sum(losses.values()).backward()
    assert losses["loss_distill"].dtype == torch.float32
    assert all(torch.isfinite(loss) for loss in losses.values())
    found = float(losses["loss_distill"].detach())
    assert found == pytest.approx(expected["loss_distill"], rel=0.05)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == gradients(model).keys()
    assert [name for name, p in trained.items() if not torch.isfinite(p.grad).all()] == []
