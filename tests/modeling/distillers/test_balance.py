"""LOSS_WEIGHT "auto": the gradient of each term is a share of that of the detection losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import distributed

from ssim_kd.modeling.distillers.balance import (
    FIRST,
    PERIOD,
    WINDOW,
    GradientBalance,
    measure_gradients,
)
from tests.helpers import build, distilled_config, make_batch

AUTO = ("LOSS_WEIGHT", "auto")
SSIM = ["SSIMDistiller", *AUTO]
TERMS = {
    "maps": [SSIM],
    "below the FPN": [[*SSIM, "IN_FEATURES", ["res3"], "GRADIENT_SHARE", 0.1]],
    "a sum of large numbers": [["MGDDistiller", *AUTO]],
    "heads": [["RCNNHeadDistiller", *AUTO, "GRADIENT_SHARE", 3.0]],
    "two": [["L2Distiller", *AUTO], ["PKDDistiller", *AUTO, "GRADIENT_SHARE", 2.0]],
}


def auto_model(weights: Any, terms: list[Any], *opts: Any) -> Any:
    cfg = distilled_config("faster", "faster", weights, *opts)
    cfg.MODEL.DISTILL.TERMS = terms
    return build(cfg)


def step(model: Any, iteration: int = 0, seed: int = 3) -> dict[str, torch.Tensor]:
    model.train()
    torch.manual_seed(seed)
    with EventStorage(iteration):
        return model(make_batch())


def norm(loss: torch.Tensor, maps: list[torch.Tensor]) -> float:
    found = torch.autograd.grad(loss, maps, retain_graph=True, allow_unused=True)
    return math.sqrt(sum(float(g.double().square().sum()) for g in found if g is not None))


@pytest.mark.parametrize(
    ("terms", "amp"), [*((name, False) for name in TERMS), ("a sum of large numbers", True)]
)
def test_the_gradients_at_the_maps_have_the_share(terms, amp, weights_of) -> None:
    model = auto_model(weights_of("faster"), TERMS[terms])
    outputs: dict[str, torch.Tensor] = {}
    for source in (model.backbone, model.backbone.bottom_up):
        source.register_forward_hook(lambda _module, _inputs, output: outputs.update(output))
    with torch.autocast("cpu", enabled=amp), torch.backends.mkldnn.flags(enabled=not amp):
        losses = step(model)
    distillation = losses.pop("loss_distill")
    shares = []
    for name, distiller in model.distillers.items():
        balance = distiller.balance
        assert float(model.metrics[f"distill/{name}_share"]) == pytest.approx(balance.share)
        assert float(model.metrics[f"distill/{name}_weight"]) == float(balance.weight())
        maps = [outputs[level] for level in balance.student_taps]
        shares.append(balance.share)
        of_all = norm(distillation, maps) / norm(sum(losses.values()), maps)
    if len(shares) == 1:
        assert of_all == pytest.approx(shares[0], rel=0.02 if amp else 1e-4)
    else:  # of gradients that point elsewhere
        assert shares[0] - shares[1] <= of_all <= sum(shares)


def test_a_schedule_changes_the_share(weights_of) -> None:
    schedule = ("MODEL.DISTILL.SCHEDULE.NAME", "linear", "SOLVER.MAX_ITER", 4)
    model = auto_model(weights_of("faster"), [SSIM], *schedule)
    step(model, 0)
    whole = float(model.metrics["distill/ssim_weight"])
    step(model, 3)
    assert float(model.metrics["distill/ssim_weight"]) == pytest.approx(whole / 4, rel=1e-5)


def test_a_plain_weight_measures_nothing(weights_of) -> None:
    model = auto_model(weights_of("faster"), [["SSIMDistiller"]])
    step(model)
    assert model.distillers["ssim"].balance is None
    assert not any("balance" in key for key in model.state_dict())
    assert "distill/ssim_share" not in model.metrics


def test_parts_of_a_batch_and_iterations_between_have_the_weight_of_the_last_measurement(
    weights_of,
) -> None:
    model = auto_model(weights_of("faster"), [SSIM])
    balance = model.distillers["ssim"].balance
    for iteration, seed, count in ((0, 3, 1), (0, 4, 1), (1, 5, 2), (FIRST, 6, 2), (PERIOD, 7, 3)):
        step(model, iteration, seed)
        assert float(balance.count) == count, iteration


def test_a_resumed_training_has_the_same_weights(weights_of) -> None:
    whole = auto_model(weights_of("faster"), [SSIM])
    for iteration in range(3):
        step(whole, iteration, seed=iteration)
    resumed = auto_model(weights_of("faster"), [SSIM])
    resumed.load_state_dict(whole.state_dict())
    for iteration in (3, FIRST, PERIOD):
        losses = [step(model, iteration, seed=9) for model in (whole, resumed)]
        assert torch.equal(losses[0]["loss_distill"], losses[1]["loss_distill"])
        assert whole.metrics == resumed.metrics


def test_a_frozen_backbone_is_refused(weights_of) -> None:
    model = auto_model(weights_of("faster"), [["RCNNHeadDistiller", *AUTO]])
    model.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match="LOSS_WEIGHT is 'auto', but no map") as caught:
        step(model)
    assert "frozen" in str(caught.value)


def test_a_student_without_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="weight is 'auto', but the student Linear"):
        GradientBalance(10.0).bind(torch.nn.Linear(1, 1), ["weight"])


def test_norms_are_over_all_processes(monkeypatch) -> None:
    balance = GradientBalance(10.0)
    balance.student_taps = ["p2"]
    x = torch.ones((), requires_grad=True)

    def other_process(squares: torch.Tensor) -> None:
        squares.add_(torch.tensor([[16.0], [9.0]]))

    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", other_process)
    # Gradients of 3 and 4 here, and of 4 and 3 there: norms of 5.
    measure_gradients([(balance, 4 * x)], {"loss_cls": 3 * x}, {"p2": x}, 0)
    assert float(balance.detection) == float(balance.distillation) == pytest.approx(5)


def test_update_by_hand() -> None:
    def tensors(*values: float) -> list[torch.Tensor]:
        return [torch.tensor(value) for value in values]

    balance = GradientBalance(10.0)
    assert float(balance.weight()) == 1
    for useless in ((1.0, 0.0), (math.nan, 1.0), (1.0, math.inf)):
        balance.update(*tensors(*useless), 0)
        assert float(balance.weight()) == 1
    balance.update(*tensors(4.0, 2.0), 0)
    assert (float(balance.weight()), float(balance.measured_share)) == (20, 10)
    balance.update(*tensors(8.0, 1.0), 1)  # means 6 and 1.5: 40, and 40 x 1 / 8
    assert (float(balance.weight()), float(balance.measured_share)) == (40, 5)
    for iteration in range(10 * WINDOW):  # what is older than some windows is forgotten
        balance.update(*tensors(1.0, 1.0), iteration)
    assert float(balance.weight()) == pytest.approx(10, rel=1e-3)
