"""Several terms at once: their sum, their names, their overrides, their heads and optimizers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from fvcore.common.param_scheduler import CosineParamScheduler
from torch import nn

from ssim_kd.engine.optimizer import GroupedOptimizer, build_optimizer
from ssim_kd.modeling import (
    DISTILLER_REGISTRY,
    DistilledDetector,
    FrozenTeacher,
    PyramidDistiller,
)
from tests.helpers import (
    build,
    distilled_config,
    make_batch,
    stock_config,
    train_losses,
)

D = "MODEL.DISTILL."
SSIM = ["SSIMDistiller", "LOSS_WEIGHT", 2.0, "SSIM.WINDOW_SIZE", 5]
L2 = ["LpDistiller", "LOSS", "l2", "IN_FEATURES", ["p3", "p4"], "LOSS_WEIGHT", 30.0]


def model_of(terms: list[Any], weights, *opts: Any, kinds=("faster", "cascade")):
    cfg = distilled_config(*kinds, weights, *opts)
    cfg.MODEL.DISTILL.TERMS = terms
    return build(cfg)


def test_terms_sum_to_each_alone(weights_of) -> None:
    # One width, so that no adapter draws other weights in the one than in the other.
    opts = ("MODEL.FPN.OUT_CHANNELS", 48)
    single = [train_losses(model_of([t], weights_of("cascade"), *opts)) for t in (SSIM, L2)]
    model = model_of([SSIM, L2], weights_of("cascade"), *opts)
    together = train_losses(model)
    expected = sum(x["loss_distill"] for x in single)
    torch.testing.assert_close(together["loss_distill"], expected)
    assert {k for k in together if k != "loss_distill"} == {
        k for k in single[0] if k != "loss_distill"
    }
    assert set(model.distillers) == {"ssim", "l2"}
    parts = sum(model.metrics[f"distill/{name}_weighted"] for name in model.distillers)
    torch.testing.assert_close(parts, together["loss_distill"].detach())
    assert {"distill/l2_p3", "distill/l2_p4"} <= set(model.metrics)
    assert "distill/l2_p2" not in model.metrics


def test_build_distillers_names_equal_terms_apart(weights_of) -> None:
    model = model_of([SSIM, ["SSIMDistiller", "IN_FEATURES", ["res3"]]], weights_of("cascade"))
    assert list(model.distillers) == ["ssim", "ssim_2"]
    train_losses(model)
    assert {"distill/ssim_p2", "distill/ssim_2_res3"} <= set(model.metrics)


def test_heads_of_the_teacher_are_absent_unless_asked_for(weights_of) -> None:
    without = model_of([SSIM], weights_of("faster"), kinds=("faster", "faster"))
    assert without.load_teacher().detector is None
    both = model_of([SSIM, ["RCNNHeadDistiller"]], weights_of("faster"), kinds=("faster", "faster"))
    heads = both.load_teacher().detector.roi_heads
    assert not any(m.training for m in heads.modules())
    assert not any(p.requires_grad for p in heads.parameters())
    saved = torch.load(weights_of("faster"))["model"]
    name = "box_predictor.cls_score.weight"
    assert torch.equal(heads.state_dict()[name], saved[f"roi_heads.{name}"])
    losses = train_losses(both)
    assert losses["loss_distill"] > 0
    assert {"distill/rcnn_head_cls", "distill/rcnn_head_box"} <= set(both.metrics)


def test_a_schedule_moves_the_weight_with_the_iteration(weights_of) -> None:
    opts = ("SOLVER.MAX_ITER", 100, D + "SCHEDULE.NAME", "linear", D + "LOSS_WEIGHT", 8.0)
    model = model_of([], weights_of("cascade"), *opts).train()
    found = {}
    for iteration in (0, 50, 99):
        torch.manual_seed(0)
        with EventStorage(iteration):
            model(make_batch())
        raw, weighted = (model.metrics[f"distill/ssim_p3{end}"] for end in ("", "_weighted"))
        found[iteration] = float(weighted / raw)
    assert found == {0: pytest.approx(8.0), 50: pytest.approx(4.0), 99: pytest.approx(0.08)}


class Projected(PyramidDistiller):
    """A method with its own modules, in a separate optimizer."""

    def build(self, student, teacher) -> None:
        self.project = nn.ModuleDict({k: nn.Conv2d(s.channels, 4, 1) for k, s in teacher.items()})

    def level_loss(self, maps, batch):
        project = self.project[maps.level]
        return (project(maps.student) - project(maps.teacher)).square().mean()

    def param_groups(self, base_lr):
        return [
            {
                "params": list(self.project.parameters()),
                **{"optimizer": "AdamW", "lr": 1e-4, "weight_decay": 1e-4, "clip_norm": 0.01},
                "schedule": CosineParamScheduler(1.0, 0.0),
            }
        ]


def projected() -> DistilledDetector:
    return DistilledDetector(
        student=build(stock_config("faster")),
        teacher=FrozenTeacher(build(stock_config("faster", fpn=48), seed=1)),
        distillers=[Projected(name="projected", levels=["p3"])],
        max_iter=10,
    )


def test_build_optimizer_gives_a_method_its_own_group() -> None:
    model = projected()
    cfg = stock_config("faster", "SOLVER.MAX_ITER", 10, "SOLVER.BASE_LR", 1e-5)
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, GroupedOptimizer)
    own = {id(p) for p in model.distillers["projected"].project.parameters()}
    sgd, adamw = optimizer.optimizers
    assert {id(p) for g in adamw.param_groups for p in g["params"]} == own
    rest = {id(p) for g in sgd.param_groups for p in g["params"]}
    # The adapter has no separate group: it trains with the student.
    assert {id(p) for p in model.distillers["projected"].adapters.parameters()} <= rest
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert own | rest == trained and not own & rest

    weight = model.distillers["projected"].project["p3"].weight
    for iteration in range(3):
        optimizer.zero_grad()
        sum(train_losses(model).values()).backward()
        before = weight.detach().clone()
        optimizer.step()
        # AdamW's step is its learning rate, which follows the cosine from 1e-4.
        rate = 1e-4 * CosineParamScheduler(1.0, 0.0)(iteration / 10)
        assert adamw.param_groups[0]["lr"] == pytest.approx(rate)
        assert float((weight - before).abs().max()) <= 1.1 * rate
        assert float(weight.grad.norm()) <= 0.0101

    # A resumed optimizer goes on bit for bit.
    twin_model = projected()
    twin_model.load_state_dict(model.state_dict())
    twin = build_optimizer(cfg, twin_model)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, step in ((model, optimizer), (twin_model, twin)):
        step.zero_grad()
        sum(train_losses(one).values()).backward()
        step.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin_model.state_dict()[name]), name


def test_modules_of_a_method_are_no_part_of_the_student() -> None:
    model = projected()
    assert not any("project" in name for name in model.student.state_dict())
    assert any("distillers.projected.project" in name for name in model.state_dict())
    assert DISTILLER_REGISTRY.get("SSIMDistiller") is not None
