"""The optimizer: Detectron2's, with separate groups for the modules of distillers."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from fvcore.common.param_scheduler import ParamScheduler
from torch import nn

from ..modeling import DistilledDetector, unwrap

# Keys of a group that are not options of its optimizer.
_OWN_KEYS = ("optimizer", "schedule", "clip_norm")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Detectron2's optimizer, and those that distillers ask for by ``param_groups``.

    Args:
        cfg: SOLVER.* is read.
        model: a :class:`DistilledDetector` or any detector, not wrapped in DDP.

    Returns:
        what :func:`add_groups` returns.

    Raises:
        ValueError: a group with an unknown optimizer, or with a parameter that is in another.
    """
    main = build_detectron2_optimizer(cfg, model)
    return add_groups(main, model, base_lr=cfg.SOLVER.BASE_LR, max_iter=cfg.SOLVER.MAX_ITER)


def add_groups(
    main: torch.optim.Optimizer, model: nn.Module, *, base_lr: float, max_iter: int
) -> torch.optim.Optimizer:
    """Move what distillers ask for by ``param_groups`` into separate optimizers.

    Args:
        main: of all parameters of the model; it loses those.
        model: a :class:`DistilledDetector` or any detector, not wrapped in DDP.
        base_lr: of the run.
        max_iter: iterations of the run.

    Returns:
        ``main`` if no distiller asks; else a :class:`GroupedOptimizer`.

    Raises:
        ValueError: a group with an unknown optimizer, or with a parameter that is in another.
    """
    detector = unwrap(model)
    groups: list[dict[str, Any]] = (
        detector.param_groups(base_lr) if isinstance(detector, DistilledDetector) else []
    )
    if not groups:
        return main
    own = [id(p) for group in groups for p in group["params"]]
    if len(set(own)) < len(own):
        raise ValueError("Two groups of the distillers' param_groups share a parameter.")
    for group in main.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in own]
    main.param_groups[:] = [group for group in main.param_groups if group["params"]]
    return GroupedOptimizer(main, groups, max_iter=max_iter)


class GroupedOptimizer(torch.optim.Optimizer):
    """Several optimizers that are stepped, saved and scheduled as one.

    A learning rate scheduler sees the groups of all. A group with its own schedule takes the
    learning rate from that.
    """

    def __init__(
        self, main: torch.optim.Optimizer, groups: list[dict[str, Any]], *, max_iter: int
    ) -> None:
        """
        Args:
            main: of the student, and of modules without a group.
            groups: see :meth:`Distiller.param_groups`.
            max_iter: iterations of the training, for the schedules.

        Raises:
            ValueError: an optimizer that ``torch.optim`` has not.
        """
        self.optimizers = [main]
        self._rules: list[dict[str, Any]] = [{}]
        for group in groups:
            name = group.get("optimizer", type(main).__name__.removesuffix("WithGradientClip"))
            make: Any = getattr(torch.optim, name, None)
            if not (isinstance(make, type) and issubclass(make, torch.optim.Optimizer)):
                raise ValueError(
                    f"A distiller's param_groups names the optimizer {name!r}; expected one of "
                    "torch.optim, e.g. 'SGD' or 'AdamW'."
                )
            options = {k: v for k, v in group.items() if k not in _OWN_KEYS}
            options.setdefault("lr", main.param_groups[0]["lr"])
            options.setdefault("initial_lr", options["lr"])
            self.optimizers.append(make([options]))  # type: ignore[call-arg]
            self._rules.append({k: group[k] for k in _OWN_KEYS if k in group})
        self._max_iter, self._steps = max_iter, 0
        parameters = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
        torch.optim.Optimizer.__init__(self, parameters, {})
        self._gather()

    def _gather(self) -> None:
        self.param_groups = [group for o in self.optimizers for group in o.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every optimizer."""
        for optimizer, rules in zip(self.optimizers, self._rules, strict=True):
            for group in optimizer.param_groups if rules else ():
                schedule: ParamScheduler | None = rules.get("schedule")
                if schedule is not None:
                    where = min(self._steps / self._max_iter, 1.0 - 1e-9)
                    group["lr"] = group["initial_lr"] * schedule(where)
                if "clip_norm" in rules:
                    torch.nn.utils.clip_grad_norm_(group["params"], rules["clip_norm"])
            optimizer.step()
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The states of all."""
        return {"optimizers": [o.state_dict() for o in self.optimizers], "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up :meth:`state_dict`.

        Raises:
            ValueError: another number of optimizers or groups.
        """
        states = state_dict.get("optimizers", [])
        if len(states) != len(self.optimizers):
            raise ValueError(
                f"The checkpoint holds {len(states)} optimizers; expected {len(self.optimizers)}."
            )
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        self._steps = int(state_dict["steps"])
        self._gather()
