"""Any student with any teacher whose levels match."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssim_kd.modeling import DistillBatch
from tests.helpers import (
    STUDENT_FPN,
    TEACHER_FPN,
    build,
    distilled_config,
    make_batch,
    train_losses,
)
from tools import pairs

ROOT = Path(__file__).resolve().parents[2]
P2_P6 = ["p2", "p3", "p4", "p5", "p6"]
P3_P6 = ["p3", "p4", "p5", "p6"]
RES = ["res2", "res3", "res4", "res5"]


def the_distiller(model):
    """The only distiller of a model."""
    (distiller,) = model.distillers.values()
    return distiller


def check_step(model, batch=None) -> None:
    """One step: finite losses, and only a gradient of the distillation in every adapter."""
    losses = train_losses(model, batch)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["loss_distill"] > 0
    losses["loss_distill"].backward(retain_graph=True)
    for name, p in the_distiller(model).named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        assert p.grad.any() or name.endswith("bias"), name
    reached = [n for n, p in model.student.backbone.named_parameters() if p.grad is not None]
    assert reached
    sum(losses.values()).backward()


def record_maps(model) -> list:
    """What the distiller of a model compares, filled step by step."""
    distiller, seen = the_distiller(model), []
    original = distiller.pyramid_loss
    distiller.pyramid_loss = lambda maps, batch: seen.append(maps) or original(maps, batch)
    return seen


@pytest.mark.parametrize(
    ("student", "teacher", "levels"),
    [
        ("faster", "cascade", P2_P6),
        ("faster", "mask", P2_P6),
        ("mask", "cascade", P2_P6),
        ("cascade", "faster", P2_P6),
        ("retinanet", "retinanet", [*P3_P6, "p7"]),
        # Of p2-p6 and p3-p7 the four in the middle are common, and their strides agree.
        ("retinanet", "cascade", P3_P6),
        ("faster", "retinanet", P3_P6),
        # A C4 student has no FPN: its res4 is compared with the one below the teacher's.
        ("c4", "faster", ["res4"]),
        ("c4", "c4", ["res4"]),
    ],
)
def test_common_levels_are_found(student, teacher, levels, weights_of) -> None:
    model = build(distilled_config(student, teacher, weights_of(teacher)))
    assert the_distiller(model).levels == levels
    # p7 of a small image is a single cell, constant when scaled: no gradient.
    check_step(model, make_batch(((160, 256),)) if "p7" in levels else None)
    assert {k for k in model.metrics if not k.endswith("_weighted")} == {
        f"distill/ssim_{level}" for level in levels
    }
    # FPNs of 32 and 48 channels; backbones below them that are alike need no adapter.
    assert list(the_distiller(model).adapters) == [level for level in levels if level[0] == "p"]


@pytest.mark.parametrize(
    ("teacher", "levels"), [("mask", RES), ("mask", ["res5", "p3"]), ("c4", ["res4"])]
)
def test_levels_can_be_named(teacher, levels, weights_of) -> None:
    named = ("MODEL.DISTILL.IN_FEATURES", levels)
    model = build(distilled_config("faster", teacher, weights_of(teacher), *named))
    assert the_distiller(model).levels == levels
    check_step(model)


def test_class_counts_may_differ(weights_of) -> None:
    opts = ("MODEL.ROI_HEADS.NUM_CLASSES", 3)
    model = build(distilled_config("faster", "faster", weights_of("faster"), *opts))
    assert model.student.roi_heads.num_classes == 3
    check_step(model)


def test_maps_padded_unlike_are_cropped(weights_of) -> None:
    # The C4 student does not pad: 100 x 130 gives 7 x 9 cells. Its teacher pads to 128 x 160.
    model = build(distilled_config("c4", "faster", weights_of("faster")))
    seen = record_maps(model)
    train_losses(model, make_batch(((100, 130),)))
    ((maps,),) = seen
    assert maps.student.shape[-2:] == maps.teacher.shape[-2:] == (7, 9)
    assert maps.mask is None


@pytest.mark.parametrize(
    ("student", "teacher", "teacher_stride", "student_stride"),
    [("dc5", "faster", 32, 16), ("faster", "dc5", 16, 32)],
)
def test_strides_that_differ_are_resized_where_asked_for(
    student, teacher, teacher_stride, student_stride, weights_of
) -> None:
    opts = ("MODEL.DISTILL.IN_FEATURES", ["res5"])
    cfg = distilled_config(student, teacher, weights_of(teacher), *opts)
    with pytest.raises(ValueError, match=rf"'res5': \({student_stride}, {teacher_stride}\)"):
        build(cfg)
    cfg.MODEL.DISTILL.RESIZE = "bilinear"
    model = build(cfg)
    seen = record_maps(model)
    check_step(model)
    ((maps,),) = seen
    assert maps.student.shape == maps.teacher.shape
    assert maps.student.shape[-2:] == (96 // student_stride, 128 // student_stride)


def test_resizing_keeps_the_cells_at_the_right_and_bottom(weights_of) -> None:
    # 208 x 272 pixels are 13 x 17 cells of the teacher's, 6.5 x 8.5 of the student's.
    opts = ("MODEL.DISTILL.IN_FEATURES", ["res5"], "MODEL.DISTILL.RESIZE", "bilinear")
    distiller = the_distiller(build(distilled_config("faster", "dc5", weights_of("dc5"), *opts)))
    columns = torch.arange(17.0).expand(1, 2, 13, 17)
    batch = DistillBatch([(208, 272)])
    maps = distiller.align("res5", torch.zeros(1, 2, 7, 9), columns, batch)
    ours, theirs = maps.student, maps.teacher
    assert ours.shape == theirs.shape and theirs.shape[-2:] == (7, 9)
    # Pairs of columns are averaged; the last one is single.
    assert theirs[0, 0, -1].tolist() == [*(2 * i + 0.5 for i in range(8)), 16.0]


@pytest.mark.parametrize(
    ("mode", "fpn", "adapted"),
    [
        ("auto", TEACHER_FPN, []),
        ("auto", STUDENT_FPN, P2_P6),
        ("always", TEACHER_FPN, P2_P6),
        ("none", TEACHER_FPN, []),
    ],
)
def test_adapters_are_made_where_asked_for(mode, fpn, adapted, weights_of) -> None:
    opts = ("MODEL.DISTILL.ADAPTER", mode, "MODEL.FPN.OUT_CHANNELS", fpn)
    model = build(distilled_config("faster", "faster", weights_of("faster"), *opts))
    adapters = the_distiller(model).adapters
    assert list(adapters) == adapted
    assert all(tuple(a.weight.shape) == (TEACHER_FPN, fpn, 1, 1) for a in adapters.values())
    check_step(model)


def test_a_student_can_teach_in_its_turn(weights_of, tmp_path) -> None:
    cfg = distilled_config("faster", "faster", weights_of("faster"))
    first = build(cfg)
    torch.save({"model": first.student.state_dict()}, tmp_path / "model_final.pth")
    # Its config, with all the keys of its own distillation and of the projects.
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = distilled_config("retinanet", "faster", tmp_path / "model_final.pth")
    again.MODEL.DISTILL.TEACHER.NAME = str(tmp_path / "config.yaml")
    again.MODEL.DISTILL.TEACHER.OPTS = []
    again.MODEL.DISTILL.TEACHER.FOLD_BN = False
    model = build(again)
    model.load_teacher()
    expected = first.student.backbone.state_dict()
    for name, value in model.load_teacher().backbone.state_dict().items():
        assert torch.equal(value, expected[name])
    check_step(model)


@pytest.mark.parametrize(
    ("student", "teacher", "levels"),
    [
        ("fcos", "retinanet", "p3-p7"),
        ("retinanet", "fcos", "p3-p7"),
        ("faster", "fcos", "p3-p6"),
        ("fcos", "keypoint", "p3-p6"),
        ("keypoint", "panoptic", "p2-p6"),
        ("panoptic", "dc5", None),
        ("dc5", "dc5", "res5"),
        ("c4", "panoptic", "res4"),
        ("mobilenet", "keypoint", "p2-p6"),
        ("fcos", "rtdetr", "p3-p5"),
        ("c4", "rtdetr", None),
        ("faster", "vitdet", "p2-p6"),
        ("vitdet", "vitdet", "p2-p6"),
    ],
)
def test_pairs_of_other_detectors_step_or_name_their_levels(student, teacher, levels) -> None:
    for name in {student, teacher} & pairs.NEEDS.keys():
        pytest.importorskip(pairs.NEEDS[name], reason=f"{name} needs it")
    if levels:
        assert pairs.step(student, teacher) == levels
        return
    with pytest.raises(ValueError, match="`levels`") as error:
        pairs.step(student, teacher)
    assert error.match("stride 16")


@pytest.mark.parametrize(
    ("student", "teacher", "distiller", "named"),
    [
        ("fcos", "fcos", "dense_head", None),
        ("fcos", "retinanet", "dense_head", "anchor"),
        ("faster", "panoptic", "rcnn_head", None),
        ("faster", "retinanet", "rcnn_head", "RetinaNet"),
    ],
)
def test_pairs_of_heads_step_or_name_what_differs(student, teacher, distiller, named) -> None:
    if named is None:
        assert pairs.step(student, teacher, distiller) == "yes"
        return
    with pytest.raises(ValueError, match=named):
        pairs.step(student, teacher, distiller)


def test_pairs_page_has_a_row_a_student_and_the_reasons(tmp_path) -> None:
    page = tmp_path / "pairs.md"
    options = ["--students", "c4", "retinanet", "--teachers", "faster", "c4"]
    pairs.main([*options, "--distillers", "features", "dense_head", "--output", str(page)])
    text = page.read_text()
    assert "| Faster R-CNN C4 | res4 | res4 |" in text
    assert "| RetinaNet | p3-p6 | no |" in text
    assert "From no teacher: Faster R-CNN C4, RetinaNet." in text
    assert text.count("Student and teacher share no level") == 1


def test_page_of_pairs_knows_every_detector() -> None:
    text = (ROOT / "docs" / "pairs.md").read_text()
    for title, _ in pairs.DETECTORS.values():
        assert f"| {title} |" in text
