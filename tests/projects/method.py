"""What every method must hold. The tests of a method are a class that derives from one of these.

Its own part is a value worked by hand, and the formula in float64 with none of our functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from ssim_kd.modeling import (
    DistilledDetector,
    Distiller,
    FrozenTeacher,
    build_distillers,
    resolved_config,
)
from ssim_kd.modeling.distillers import bind_distillers
from tests.helpers import (
    STUDENT_FPN,
    build,
    build_fcos,
    full_config,
    gradients,
    stock_config,
    train_losses,
)


def detector(kind: str, *opts: Any, fpn: int = STUDENT_FPN, seed: int = 0) -> Any:
    """A small detector with towers of two convolutions, whose head is not sure of everything."""
    if kind == "fcos":
        model: Any = build_fcos(fpn=fpn, seed=seed)
    else:
        model = build(stock_config(kind, "MODEL.RETINANET.NUM_CONVS", 2, *opts, fpn=fpn), seed=seed)
    for layer in ("cls_score", "bbox_pred"):
        if hasattr(model, "head"):
            nn.init.normal_(getattr(model.head, layer).weight, std=0.1)
    return model


def teacher_of(kind: str, *opts: Any) -> Any:
    """One of another width."""
    return detector(kind, *opts, fpn=64, seed=1)


def distilled(student: Any, teacher: Any, *distillers: Distiller) -> DistilledDetector:
    return DistilledDetector(
        student=student, teacher=FrozenTeacher(teacher), distillers=distillers, max_iter=10
    )


class Method:
    """What methods of maps and of heads have in common."""

    #: The class that is tested.
    method: Any
    #: Options that make it small.
    options: Mapping[str, Any] = {}
    #: Its own weight for R-CNN, and for dense detectors; None for a kind that it does not serve.
    weights: tuple[float | None, float | None] = (1.0, 1.0)
    #: Options out of their range: argument, value, key.
    bad: Sequence[tuple[str, Any, str]] = ()
    #: Whether it trains the heads of the student.
    of_heads = False

    def test_an_option_out_of_range(self) -> None:
        """Python names the argument, a config its key; both the value."""
        for argument, value, key in self.bad:
            shown = repr(value[-1] if isinstance(value, list) and "weights" in argument else value)
            holder, _, entry = argument.partition(".")
            with pytest.raises(ValueError) as caught:
                self.method(**{holder: {entry: value} if entry else value})
            words = str(caught.value)
            assert words.startswith((f"{argument} ", f"{entry or argument} ")), argument
            assert "MODEL." not in words
            cfg = full_config()
            cfg.MODEL.DISTILL.NAME = self.method.__name__
            *parents, last = key.split(".")
            node = cfg.MODEL.DISTILL
            for parent in parents:
                node = node[parent]
            assert last in node
            node[last] = value
            with pytest.raises(ValueError, match=rf"^MODEL\.DISTILL\.{key} ") as caught:
                build_distillers(cfg)
            assert any(x in str(caught.value) for x in (shown, repr(value), repr(value)[1:-1]))

    @pytest.mark.parametrize("dense", [False, True], ids=["rcnn", "dense"])
    def test_a_name_by_itself_trains(self, dense) -> None:
        """As NAME, as a term and in Python alike; what is own is known, and written."""
        weight = self.weights[dense]
        if weight is None:
            return
        kind, name = ("faster", "retinanet")[dense], self.method.__name__
        named, terms = full_config(), full_config()
        named.MODEL.DISTILL.NAME, terms.MODEL.DISTILL.TERMS = name, [[name]]
        model = distilled(detector(kind), teacher_of(kind), *build_distillers(named))
        (distiller,) = model.distillers.values()

        def bound(built: list[Distiller]) -> Distiller:
            bind_distillers(built, model.student, model.teacher)
            return built[0]

        assert distiller.weight(0.5) == weight
        for other in (build_distillers(terms), [self.method()]):
            assert bound(other).own == distiller.own
        # What is written into config.yaml means the same, and leaves nothing open.
        for cfg in (named, terms):
            again = bound(build_distillers(resolved_config(cfg, [distiller])))
            assert not again.own and again.weight(0.5) == weight
            assert again.part_weights == distiller.part_weights
            assert getattr(again, "levels", None) == getattr(distiller, "levels", None)

        before = {k: v.clone() for k, v in model.teacher.model.state_dict().items()}
        losses = train_losses(model)
        losses["loss_distill"].backward()
        assert losses["loss_distill"] > 0
        reached, own = gradients(model.student), dict(distiller.named_parameters())
        assert all(torch.isfinite(g).all() for g in gradients(model).values())
        # ICD's decoder learns first.
        assert any(g.any() for g in reached.values()) != hasattr(distiller, "detach_iters")
        assert all(p.grad is not None for p in own.values())
        assert self.of_heads or all(name.startswith("backbone.") for name in reached)
        theirs = model.teacher.model
        assert not any(p.requires_grad or p.grad is not None for p in theirs.parameters())
        assert not any(module.training for module in theirs.modules())
        assert all(torch.equal(v, before[k]) for k, v in theirs.state_dict().items())
        assert not any("distillers" in n for n in model.student.state_dict())
        assert {f"distillers.{distiller.name}.{n}" for n in own} <= set(model.state_dict())
