"""The weight of a distillation loss over the training: ``MODEL.DISTILL.SCHEDULE``."""

from detectron2.config import CfgNode
from detectron2.solver.lr_scheduler import WarmupParamScheduler
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)

from ...ops.options import check_choice, check_number

SCHEDULES = ("constant", "linear", "cosine", "step")


def build_schedule(cfg: CfgNode, weight: float) -> ParamScheduler:
    """A weight as ``MODEL.DISTILL.SCHEDULE`` changes it.

    It depends only on iteration / MAX_ITER, so that a resumed training needs no state.

    Raises:
        ValueError: a value out of its range.
    """
    node = cfg.MODEL.DISTILL.SCHEDULE
    total = int(cfg.SOLVER.MAX_ITER)
    end = check_number("MODEL.DISTILL.SCHEDULE.END_FACTOR", node.END_FACTOR, least=0)
    gamma = check_number("MODEL.DISTILL.SCHEDULE.GAMMA", node.GAMMA, least=0)
    check_choice("MODEL.DISTILL.SCHEDULE.NAME", node.NAME, SCHEDULES)
    # A warm-up has to end, for its last value is that of the schedule after it.
    for key, last in (("WARMUP_ITERS", total - 1), ("STOP_ITER", total)):
        if not 0 <= node[key] <= last:
            raise ValueError(
                f"MODEL.DISTILL.SCHEDULE.{key} is {node[key]}; expected 0 to {last} "
                f"(SOLVER.MAX_ITER is {total})."
            )
    schedule = _decay(node, weight, end, gamma, total)
    if node.WARMUP_ITERS:
        # From 0, linearly.
        schedule = WarmupParamScheduler(schedule, 0.0, node.WARMUP_ITERS / total, "linear")
    if 0 < node.STOP_ITER < total:
        stop = node.STOP_ITER / total
        schedule = CompositeParamScheduler(
            [schedule, ConstantParamScheduler(0.0)],
            lengths=[stop, 1 - stop],
            interval_scaling=["fixed", "fixed"],
        )
    return schedule


def _decay(node: CfgNode, weight: float, end: float, gamma: float, total: int) -> ParamScheduler:
    if node.NAME == "linear":
        return LinearParamScheduler(weight, weight * end)
    if node.NAME == "cosine":
        return CosineParamScheduler(weight, weight * end)
    if node.NAME == "step":
        steps = list(node.STEPS)
        if not steps or steps != sorted(set(steps)) or not 0 < steps[0] <= steps[-1] < total:
            raise ValueError(
                f"MODEL.DISTILL.SCHEDULE.STEPS is {steps}; expected growing iterations between 0 "
                f"and SOLVER.MAX_ITER ({total})."
            )
        values = [weight * gamma**i for i in range(len(steps) + 1)]
        return MultiStepParamScheduler(values, num_updates=total, milestones=steps)
    return ConstantParamScheduler(weight)
