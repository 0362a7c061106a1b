"""The feature distiller: what it sums, logs, masks, and where its gradient goes."""

from __future__ import annotations

import itertools

import pytest
import torch
from detectron2.layers import ShapeSpec

from ssim_kd.losses import lp_loss, ssim_loss
from ssim_kd.modeling import DistillBatch, FeatureDistiller
from tests.helpers import (
    TEACHER_FPN,
    bfloat16_without_onednn,
    build,
    distilled_config,
    gradients,
    make_batch,
    train_losses,
)

SHAPES = {"p3": (12, 16), "p4": (6, 8)}
WEIGHTS = (0.5, 2.0)


def specs(channels: int = 4, strides: tuple[int, int] = (8, 16)) -> dict[str, ShapeSpec]:
    return {
        level: ShapeSpec(channels=channels, stride=stride)
        for level, stride in zip(SHAPES, strides, strict=True)
    }


def features(channels: int = 4, *, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        level: torch.randn(2, channels, *size, generator=generator) * 3 + 1
        for level, size in SHAPES.items()
    }


def make_batch_of(*sizes: tuple[int, int]) -> DistillBatch:
    return DistillBatch(list(sizes), None, torch.device("cpu"))


FULL = make_batch_of((96, 128), (96, 128))
PADDED = make_batch_of((96, 128), (57, 100))


def masks(batch: DistillBatch) -> dict[str, torch.Tensor | None]:
    return {level: batch.valid_mask(*SHAPES[level], s) for level, s in (("p3", 8), ("p4", 16))}


@pytest.mark.parametrize("scaling", ["channel", "sample", "batch", "none"])
@pytest.mark.parametrize("batch", [FULL, PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("loss", ["ssim", "l1", "l2"])
def test_the_total_is_the_weighted_sum_of_the_levels(loss, batch, scaling) -> None:
    options = {"window_size": 5, "sigma": 1.0, "gamma": 2.0}
    distiller = FeatureDistiller(
        student_shapes=specs(),
        teacher_shapes=specs(),
        loss=loss,
        scaling=scaling,
        ssim_options=options,
        level_weights=WEIGHTS,
        loss_weight=4.0,
    )
    ours, theirs = features(seed=0), features(seed=1)
    found = distiller(ours, theirs, batch)
    assert list(found) == ["loss_distill"]

    raw = {}
    for level, mask in masks(batch).items():
        common = {"scaling": None if scaling == "none" else scaling, "mask": mask}
        pair = (ours[level], theirs[level])
        if loss == "ssim":
            raw[level] = ssim_loss(*pair, **common, **options)
        else:
            raw[level] = lp_loss(*pair, p=int(loss[1]), **common)
    expected = 4.0 * (0.5 * raw["p3"] + 2.0 * raw["p4"])
    torch.testing.assert_close(found["loss_distill"], expected)

    assert distiller.metrics.keys() == {
        f"distill/{loss}_{level}{end}" for level in SHAPES for end in ("", "_weighted")
    }
    for level, weight in zip(SHAPES, WEIGHTS, strict=True):
        logged = distiller.metrics[f"distill/{loss}_{level}"]
        torch.testing.assert_close(logged, raw[level])
        weighted = distiller.metrics[f"distill/{loss}_{level}_weighted"]
        torch.testing.assert_close(weighted, 4.0 * weight * raw[level])
        assert not logged.requires_grad and not weighted.requires_grad


def test_padding_counts_where_it_is_not_masked() -> None:
    ours, theirs = features(seed=0), features(seed=1)
    values = {}
    for masked, batch in itertools.product((True, False), (FULL, PADDED)):
        distiller = FeatureDistiller(
            student_shapes=specs(), teacher_shapes=specs(), mask_padding=masked
        )
        values[masked, batch is PADDED] = float(distiller(ours, theirs, batch)["loss_distill"])
    assert values[False, True] == values[False, False] == values[True, False]
    assert values[True, True] != values[True, False]


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_what_lies_in_the_padding_does_not_matter(loss) -> None:
    distiller = FeatureDistiller(student_shapes=specs(), teacher_shapes=specs(), loss=loss)
    ours, theirs = features(seed=0), features(seed=1)
    expected = distiller(ours, theirs, PADDED)["loss_distill"]
    for level, mask in masks(PADDED).items():
        theirs[level] = torch.where(mask[:, None], theirs[level], 1e3)
    assert torch.equal(distiller(ours, theirs, PADDED)["loss_distill"], expected)


def test_a_mask_worked_by_hand() -> None:
    # 57 x 100 pixels at stride 16: rows end at 16, 32, 48, 64, so that four of six see a pixel;
    # columns at 16, ..., 112: seven of eight.
    found = PADDED.valid_mask(6, 8, 16)
    assert found.shape == (2, 6, 8) and found.dtype == torch.bool
    assert found[0].all()
    assert found[1].sum(0).tolist() == [4, 4, 4, 4, 4, 4, 4, 0]
    assert found[1].sum(1).tolist() == [7, 7, 7, 7, 0, 0]
    # Exactly at a cell's edge: 64 x 96 pixels are 4 x 6 cells, and not one more.
    exact = make_batch_of((64, 96)).valid_mask(6, 8, 16)
    assert (int(exact[0].any(1).sum()), int(exact[0].any(0).sum())) == (4, 6)
    assert make_batch_of((65, 97)).valid_mask(6, 8, 16)[0].any(1).tolist() == [True] * 5 + [False]
    # No mask is made where every cell counts.
    assert FULL.valid_mask(6, 8, 16) is None
    assert make_batch_of((81, 113)).valid_mask(6, 8, 16) is None


def test_the_batch_is_read_off_the_inputs() -> None:
    inputs = make_batch()
    batch = DistillBatch.from_inputs(inputs, torch.device("cpu"))
    assert batch.image_sizes == [(96, 128), (64, 96)]
    assert batch.instances == [x["instances"] for x in inputs]
    del inputs[1]["instances"]
    assert DistillBatch.from_inputs(inputs, torch.device("cpu")).instances is None


@pytest.mark.parametrize("loss", ["ssim", "l1", "l2"])
@pytest.mark.parametrize("batch", [FULL, PADDED], ids=["full", "padded"])
def test_equal_maps_cost_nothing(loss, batch) -> None:
    distiller = FeatureDistiller(student_shapes=specs(), teacher_shapes=specs(), loss=loss)
    same = features(seed=0)
    value = distiller(same, {k: v.clone() for k, v in same.items()}, batch)["loss_distill"]
    assert abs(float(value)) < 1e-6


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
    assert all(float(v) < 1e-5 for v in model.metrics.values())


@pytest.mark.parametrize("loss", ["ssim", "l1", "l2"])
def test_the_gradient_reaches_student_and_adapters_alone(loss, weights_of) -> None:
    cfg = distilled_config("faster", "faster", weights_of("faster"), "MODEL.DISTILL.LOSS", loss)
    model = build(cfg)
    train_losses(model)["loss_distill"].backward()
    for name, p in model.student.named_parameters():
        frozen = not p.requires_grad
        head = name.startswith(("roi_heads", "proposal_generator"))
        if frozen or head:
            assert p.grad is None, name
        elif name.endswith("weight") and p.dim() == 4:
            assert p.grad is not None and p.grad.any(), name
    # p6 is a single row of cells for these images, and p5 little more.
    for level in ("p2", "p3", "p4", "p5"):
        assert model.distiller.adapters[level].weight.grad.any(), level
    assert all(p.grad is None for p in model.teacher.backbone.parameters())


def test_the_gradient_of_the_extrema_can_be_switched_off() -> None:
    gradients = []
    for through in (True, False):
        distiller = FeatureDistiller(
            student_shapes=specs(), teacher_shapes=specs(), scaling_grad=through
        )
        ours = {k: v.requires_grad_() for k, v in features(seed=0).items()}
        distiller(ours, features(seed=1), FULL)["loss_distill"].backward()
        gradients.append(ours["p3"].grad)
    changed = (gradients[0] - gradients[1]).abs() > 1e-9
    # Only the extreme cells of each channel, two of them, feel the difference.
    assert set(changed.flatten(2).sum(-1).flatten().tolist()) == {2}


def test_a_level_of_weight_0_is_logged_and_does_nothing() -> None:
    distiller = FeatureDistiller(
        student_shapes=specs(), teacher_shapes=specs(), level_weights=(1.0, 0.0)
    )
    ours = {k: v.requires_grad_() for k, v in features(seed=0).items()}
    distiller(ours, features(seed=1), FULL)["loss_distill"].backward()
    assert ours["p3"].grad.any() and not ours["p4"].grad.any()
    assert distiller.metrics["distill/ssim_p4"] > 0
    assert distiller.metrics["distill/ssim_p4_weighted"] == 0


def test_levels_smaller_than_the_window_are_told_once(caplog) -> None:
    caplog.set_level("INFO")
    distiller = FeatureDistiller(
        student_shapes=specs(), teacher_shapes=specs(), ssim_options={"window_size": 9}
    )
    for seed in (0, 2):
        distiller(features(seed=seed), features(seed=seed + 1), FULL)
    told = [r.getMessage() for r in caplog.records if "smaller than" in r.getMessage()]
    assert len(told) == 1 and "Level p4 has maps of 6 x 8 cells" in told[0]


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
