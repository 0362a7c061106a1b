"""The teacher: frozen, hidden from the model that holds it, with its own preprocessing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ssim_kd.modeling import (
    DistilledDetector,
    Distiller,
    FrozenTeacher,
    LoadedTeacher,
    RCNNHeadDistiller,
    SSIMDistiller,
    unwrap,
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

# With its batch norms kept apart, the teacher can be compared bit by bit with the saved one.
EXACT = ("MODEL.DISTILL.TEACHER.FOLD_BN", False)


@pytest.fixture(scope="module")
def cfg(weights_of):
    return distilled_config("faster", "cascade", weights_of("cascade"), *EXACT)


@pytest.fixture
def model(cfg):
    model = build(cfg)
    model.load_teacher()
    return model


def storages(module: nn.Module) -> set[int]:
    tensors = (*module.parameters(), *module.buffers())
    return {t.data_ptr() for t in tensors if t.numel()}


def assert_frozen(teacher: LoadedTeacher, weights: Path) -> None:
    assert not any(module.training for module in teacher.backbone.modules())
    assert not any(p.requires_grad for p in teacher.backbone.parameters())
    assert all(p.grad is None for p in teacher.backbone.parameters())
    saved = torch.load(weights)["model"]
    for name, value in teacher.backbone.state_dict().items():
        assert torch.equal(value, saved[f"backbone.{name}"]), name


def test_training_leaves_the_teacher_bit_identical_and_in_eval_mode(cfg, model, weights_of) -> None:
    optimizer = build_optimizer(cfg, model)
    before = copy.deepcopy(model.student.state_dict())
    for step in range(3):
        model.train()
        losses = train_losses(model, make_batch(seed=step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        assert_frozen(model.loaded_teacher, weights_of("cascade"))
        model.eval()
        assert_frozen(model.loaded_teacher, weights_of("cascade"))
    changed = [k for k, v in model.student.state_dict().items() if not torch.equal(v, before[k])]
    assert "backbone.fpn_output2.weight" in changed


def test_no_part_of_the_model_holds_the_teacher(cfg, model) -> None:
    hidden = storages(model.load_teacher().backbone)
    modules = set(model.load_teacher().backbone.modules())
    assert hidden and not modules & set(model.modules())
    assert not hidden & {p.data_ptr() for p in model.parameters()}
    assert not hidden & {b.data_ptr() for _, b in model.named_buffers()}
    assert not hidden & {v.data_ptr() for v in model.state_dict().values() if v.numel()}
    names = {key.split(".")[0] for key in model.state_dict()}
    assert names == {"backbone", "proposal_generator", "roi_heads", "distillers"}
    groups = build_optimizer(cfg, model).param_groups
    trained = {p.data_ptr() for group in groups for p in group["params"]}
    assert not hidden & trained
    adapters = list(model.distillers["ssim"].adapters.parameters())
    assert adapters and {p.data_ptr() for p in adapters} <= trained


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    """A process group of only this process."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def test_ddp_leaves_the_teacher_out_and_finds_every_parameter_used(gloo, model) -> None:
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    hidden = storages(model.load_teacher().backbone)
    assert not hidden & {p.data_ptr() for p in ddp.parameters()}
    assert not hidden & {v.data_ptr() for v in ddp.state_dict().values() if v.numel()}
    for step in range(2):  # the second step raises if the first left a parameter unused
        sum(train_losses(ddp, make_batch(seed=step)).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_teacher_follows_the_device(cfg, model) -> None:
    assert model.to("meta") is model
    assert {p.device.type for p in model.load_teacher().backbone.parameters()} == {"meta"}
    assert {b.device.type for b in model.load_teacher().backbone.buffers()} == {"meta"}
    assert (
        model.loaded_teacher.pixel_mean.device.type
        == model.loaded_teacher.pixel_std.device.type
        == "meta"
    )


def test_the_teacher_keeps_its_precision(model, weights_of) -> None:
    model.bfloat16()
    assert_frozen(model.loaded_teacher, weights_of("cascade"))


def test_a_deep_copy_has_a_teacher_and_taps_of_its_own(model) -> None:
    twin = copy.deepcopy(model)
    assert not storages(twin.loaded_teacher.backbone) & storages(model.load_teacher().backbone)
    for parameter in model.student.parameters():
        parameter.data.zero_()
    for parameter in model.load_teacher().backbone.parameters():
        parameter.data.fill_(float("nan"))
    losses = train_losses(twin)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert twin.student.backbone.fpn_output2.weight.grad.any()
    assert model.student.backbone.fpn_output2.weight.grad is None


def test_the_heads_are_not_kept(model) -> None:
    teacher = model.load_teacher()
    held = [x for x in vars(teacher).values() if isinstance(x, nn.Module)]
    assert held == [teacher.backbone] and teacher.detector is None


X101_LIKE = ["MODEL.PIXEL_MEAN", [123.675, 116.280, 103.530], "INPUT.FORMAT", "RGB"]
X101_LIKE += ["MODEL.PIXEL_STD", [58.395, 57.120, 57.375]]


@pytest.mark.parametrize("opts", [[], X101_LIKE], ids=["BGR", "RGB"])
def test_a_teacher_sees_what_it_was_trained_on(opts, tmp_path) -> None:
    """Its own order of channels, mean and std; padded at the right and bottom."""
    stock = stock_config("faster", *opts, fpn=TEACHER_FPN)
    path = save_weights(stock, tmp_path / "teacher.pth")
    model = build(distilled_config("faster", "faster", path, *EXACT, teacher_opts=opts))
    reference = build_model(stock).eval()
    reference.load_state_dict(torch.load(path)["model"])
    batch = make_batch(((96, 128), (64, 96)))  # of the student, BGR
    given = [{"image": x["image"].flip(0) if opts else x["image"]} for x in batch]
    with torch.no_grad():
        expected = reference.backbone(reference.preprocess_image(given).tensor)
    found = model.load_teacher()([x["image"] for x in batch])
    assert set(found) == {"p2", "p3", "p4", "p5", "p6"}
    for level, value in found.items():
        assert torch.equal(value, expected[level]) and not value.requires_grad, level


def test_folded_batch_norms_change_nothing_but_the_rounding(cfg, model) -> None:
    folded = cfg.clone()
    folded.MODEL.DISTILL.TEACHER.FOLD_BN = True
    teacher = build(folded).load_teacher()
    assert not any("norm" in name for name in teacher.backbone.state_dict())
    images = [x["image"] for x in make_batch()]
    found, expected = teacher(images), model.load_teacher()(images)
    for level, value in expected.items():
        torch.testing.assert_close(
            found[level], value, rtol=1e-4, atol=1e-4 * float(value.abs().max())
        )


def test_no_teacher_without_a_backbone() -> None:
    with pytest.raises(ValueError, match="Linear has no 'backbone'"):
        FrozenTeacher(nn.Linear(1, 1))


def test_teacher_that_pads_to_a_square_refuses_larger_images(monkeypatch) -> None:
    model = build(stock_config("faster", fpn=TEACHER_FPN))
    # As ViT has it in Detectron2 main; 0.6 has no such backbone.
    square = {"square_size": 64}
    monkeypatch.setattr(type(model.backbone), "padding_constraints", square, raising=False)
    teacher = FrozenTeacher(model).load(["p3"])
    with pytest.raises(ValueError, match=r"INPUT\.MAX_SIZE_TRAIN.* 65 .* 64"):
        teacher([torch.zeros(3, 40, 65)])


def test_vitdet_teacher_is_a_lazy_config(tmp_path) -> None:
    pytest.importorskip("detectron2.modeling.backbone.vit", reason="ViT is in Detectron2 main")
    config = Path("configs/COCO-Detection/teacher_mask_rcnn_vitdet_b.py")
    small = ["net.embed_dim=32", "net.depth=2", "net.num_heads=2", "net.img_size=128"]
    small += ["net.window_block_indexes=[0]", "square_pad=128"]
    opts = [f"model.backbone.{x}" for x in small]
    lazy = LazyConfig.apply_overrides(LazyConfig.load(str(config)), opts)
    torch.save({"model": instantiate(lazy.model).state_dict()}, tmp_path / "teacher.pth")
    teacher = FrozenTeacher.load_from(str(config), str(tmp_path / "teacher.pth"), opts)
    model = DistilledDetector(
        student=build(stock_config("faster")), teacher=teacher, distillers=[SSIMDistiller()]
    )
    losses = train_losses(model)
    assert losses["loss_distill"] > 0 and teacher.input_format == "RGB"
    assert list(model.loaded_teacher([torch.zeros(3, 96, 128)])) == ["p2", "p3", "p4", "p5", "p6"]


def test_one_teacher_serves_several_trainings(weights_of) -> None:
    """Each taps what it needs, in any order, with the heads or without."""
    folder = weights_of("faster")
    cfg = distilled_config("faster", "faster", folder)
    node = cfg.MODEL.DISTILL.TEACHER
    teacher = FrozenTeacher.load_from(node.NAME, node.WEIGHTS, node.OPTS)

    def model(distiller: Distiller) -> DistilledDetector:
        return DistilledDetector(
            student=build(stock_config("faster")), teacher=teacher, distillers=[distiller]
        )

    models = [
        model(SSIMDistiller(levels=["p2", "p3"])),
        model(SSIMDistiller(levels=["p5"])),
        model(RCNNHeadDistiller()),
        model(SSIMDistiller(levels=["p4"])),
    ]
    for one in (*models[::-1], *models):
        assert train_losses(one)["loss_distill"] > 0
    assert [m.loaded_teacher.detector is not None for m in models] == [False, False, True, False]
    assert {p.device.type for p in teacher.model.parameters()} == {"meta"}


def test_a_module_that_taught_keeps_its_heads() -> None:
    detector = build(stock_config("faster", fpn=TEACHER_FPN), seed=1)
    for distiller in (SSIMDistiller(), RCNNHeadDistiller()):
        model = DistilledDetector(
            student=build(stock_config("faster")), teacher=detector, distillers=[distiller]
        )
        assert train_losses(model)["loss_distill"] > 0
    assert detector.roi_heads.box_predictor is not None


@pytest.mark.parametrize(
    "wrap", [lambda m: m, torch.compile, DataParallel, lambda m: DataParallel(torch.compile(m))]
)
def test_unwrap(wrap, model) -> None:
    assert unwrap(wrap(model)) is model
