"""Schedules: what epochs and a batch make of a recipe, in both languages of configs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler
from omegaconf import DictConfig, OmegaConf

from ssim_kd.config_loading import (
    LazySchedule,
    Schedule,
    YamlSchedule,
    rescale,
    scale_workers,
)
from ssim_kd.modeling import DistilledDetector
from ssim_kd.projects.icd import ICDDistiller
from tests.helpers import full_config

# Detectron2's "1x".
ZOO = Schedule(
    batch=16,
    max_iter=90_000,
    lr=0.02,
    warmup=1000,
    checkpoint_period=5000,
    milestones=(60_000, 80_000),
)
OURS = {
    "MODEL.DISTILL.SCHEDULE.WARMUP_ITERS": 900,
    "MODEL.DISTILL.SCHEDULE.STOP_ITER": 45_000,
    "MODEL.DISTILL.SCHEDULE.STEPS": [30_000, 60_000],
    "MODEL.DISTILL.ICD.DETACH_ITERS": 9000,
}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        # 12 epochs of COCO at the same batch: 88,722 iterations.
        (
            {"epochs": 12, "images": 118_296},
            (16, 88_722, 0.02, 986, (59_148, 78_864), 7394, 7393),
        ),
        # A batch of half the size: as many images, in twice the iterations.
        ({"batch": 8}, (8, 180_000, 0.01, 1000, (120_000, 160_000), 5000, 0)),
        # Twice the batch: half of the iterations.
        ({"batch": 32}, (32, 45_000, 0.04, 500, (30_000, 40_000), 2500, 0)),
        # 44 images, 40 epochs: the warm-up is a quarter of the training, not 5 iterations.
        ({"epochs": 40, "batch": 4, "images": 44}, (4, 440, 0.005, 110, (293, 391), 24, 11)),
        # 1000 images: 500 iterations of warm-up, not 17.
        ({"epochs": 40, "images": 1000}, (16, 2500, 0.02, 500, (1667, 2222), 139, 62)),
        # A length by hand: the milestones follow it.
        (
            {"epochs": 2, "images": 8, "batch": 4, "max_iter": 9},
            (4, 9, 0.005, 2, (6, 8), 2, 2),
        ),
        # Shorter than the number of milestones.
        ({"epochs": 1, "images": 4, "batch": 4}, (4, 1, 0.005, 1, (), 1, 1)),
    ],
)
def test_rescale_by_hand_worked_numbers(asked: dict[str, Any], expected: tuple) -> None:
    found = rescale(ZOO, **asked)
    assert found.lr == pytest.approx(expected[2])
    names = ("batch", "max_iter", "warmup", "milestones", "checkpoint_period", "eval_period")
    assert tuple(getattr(found, name) for name in names) == (*expected[:2], *expected[3:])


def test_rescale_never_lengthens_a_warmup() -> None:
    """What is short already stays: a floor is no target."""
    for warmup in (0, 1, 20):
        recipe = Schedule(batch=16, max_iter=90_000, lr=0.02, warmup=warmup)
        assert rescale(recipe, epochs=40, images=1000).warmup == warmup
        assert rescale(recipe, epochs=9999, images=1000).warmup == warmup


def test_rescale_of_periods_of_evaluation() -> None:
    for period, expected in ((0, 10), (5, 5), (5000, 10)):
        recipe = Schedule(batch=4, max_iter=9000, lr=0.1, eval_period=period)
        assert rescale(recipe, epochs=2, images=40).eval_period == expected


def yaml_config(**values: Any) -> Any:
    cfg = full_config()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.IMS_PER_BATCH = 90_000, (60_000, 80_000), 16
    cfg.merge_from_list([part for pair in values.items() for part in pair])
    return cfg


def counted(cfg: Any) -> dict[str, Any]:
    return dict(YamlSchedule(cfg).read().distillers)


def test_all_keys_that_count_iterations_are_known() -> None:
    """A key of ours that counts iterations is named *_ITERS (a length), *_ITER or STEPS (points).

    A new one has to appear here.
    """
    assert set(counted(yaml_config())) == set(OURS)


@pytest.mark.parametrize("in_terms", [False, True])
def test_keys_of_distillers_follow_epochs_batch_and_world_size(in_terms: bool) -> None:
    if in_terms:
        pairs = [
            part
            for key, value in OURS.items()
            for part in (key.removeprefix("MODEL.DISTILL."), value)
        ]
        given = {"MODEL.DISTILL.TERMS": [["SSIMDistiller"], ["ICDDistiller", *pairs]]}
        names = {key: key.replace("DISTILL.", "DISTILL.TERMS[1].") for key in OURS}
    else:
        given, names = OURS, {key: key for key in OURS}

    def found(cfg: Any) -> list[Any]:
        return [counted(cfg)[names[key]] for key in OURS]

    # 9000 iterations, a tenth.
    cfg = yaml_config(**given)
    options = {"epochs": 9.0, "batch": None, "by_hand": (), "count_images": lambda: 16_000}
    YamlSchedule(cfg).apply(**options)
    assert cfg.SOLVER.MAX_ITER == 9000
    assert found(cfg) == [500, 4500, (3000, 6000), 900]
    # Twice the batch: half of the iterations.
    cfg = yaml_config(**given)
    YamlSchedule(cfg).apply(**{**options, "epochs": None, "batch": 32})
    assert found(cfg) == [500, 22_500, (15_000, 30_000), 4500]
    # Four processes for one, as DefaultTrainer.auto_scale_workers scales WARMUP_ITERS.
    cfg = yaml_config(**given)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 1
    cfg.freeze()
    scaled = scale_workers(cfg, 4)
    assert (scaled.SOLVER.WARMUP_ITERS, scaled.SOLVER.MAX_ITER) == (250, 22_500)
    assert found(scaled) == [225, 11_250, (7500, 15_000), 2250]
    assert scaled.is_frozen() and found(cfg) == [900, 45_000, (30_000, 60_000), 9000]
    assert scale_workers(cfg, 1) is cfg


def test_keys_of_distillers_that_are_set_by_hand_stay() -> None:
    cfg = yaml_config(**OURS)
    options = {"epochs": 9.0, "batch": None, "count_images": lambda: 16_000}
    YamlSchedule(cfg).apply(**options, by_hand=("MODEL.DISTILL.SCHEDULE.STOP_ITER",))
    assert cfg.MODEL.DISTILL.SCHEDULE.STOP_ITER == 45_000
    assert cfg.MODEL.DISTILL.ICD.DETACH_ITERS == 900


LAZY = [
    "COCO-Detection/retinanet_R_50_FPN_1x.py",
    "COCO-Detection/fcos_R_50_FPN_1x.py",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py",
    "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py",
]


def lazy(name: str, epochs: float | None = None, batch: int | None = None, by_hand: Any = ()):
    cfg = model_zoo.get_config(name)
    before = LazySchedule(cfg).read()
    LazySchedule(cfg).apply(
        epochs=epochs, batch=batch, by_hand=by_hand, count_images=lambda: 44, max_iter=None
    )
    return before, cfg


@pytest.mark.parametrize("name", LAZY)
def test_apply_schedule_of_the_zoos_lazy_configs(name: str) -> None:
    before, cfg = lazy(name, epochs=40, batch=4)
    assert (cfg.train.max_iter, cfg.dataloader.train.total_batch_size) == (440, 4)
    assert cfg.optimizer.lr == pytest.approx(before.lr * 4 / before.batch)
    period = max(11, round(before.checkpoint_period * 440 / before.max_iter))
    assert (cfg.train.eval_period, cfg.train.checkpointer.period) == (11, period)
    after = LazySchedule(cfg).read()
    assert before.warmup in (500, 1000) and after.warmup == 110
    # The learning rate drops at the same share of the training.
    scheduler = instantiate(cfg.lr_multiplier)
    drops, expected = (
        [x for x in range(111, 440) if multiplier(x / 440) < multiplier((x - 1) / 440)]
        for multiplier in (scheduler, instantiate(model_zoo.get_config(name).lr_multiplier))
    )
    assert drops == expected and len(drops) == 2
    assert scheduler(110 / 440) == pytest.approx(1.0) and scheduler(60 / 440) < 0.6


def test_apply_schedule_of_a_lazy_config_by_hand() -> None:
    by_hand = {"train.max_iter", "optimizer.lr", "lr_multiplier.warmup_length"}
    before, cfg = lazy(LAZY[0], epochs=40, batch=4, by_hand=by_hand)
    assert cfg.train.max_iter == before.max_iter and cfg.optimizer.lr == before.lr
    assert LazySchedule(cfg).read().warmup == before.warmup
    assert cfg.dataloader.train.total_batch_size == 4


def lazy_parts(scheduler: Any, **distiller: Any) -> DictConfig:
    model = L(DistilledDetector)(student={}, distillers=[L(ICDDistiller)(**distiller)])
    parts = {
        "model": model,
        "train": {"max_iter": 90_000},
        "optimizer": {"lr": 0.02},
        "lr_multiplier": scheduler,
        "dataloader": {"train": {"total_batch_size": 16}},
    }
    return OmegaConf.create(parts, flags={"allow_objects": True})


def test_apply_schedule_of_a_lazy_config_with_interpolations() -> None:
    scheduler = L(MultiStepParamScheduler)(
        values=[1.0, 0.1], milestones=[60_000], num_updates="${..train.max_iter}"
    )
    cfg = lazy_parts(scheduler, detach_iters=9000)
    LazySchedule(cfg).apply(epochs=9, batch=None, by_hand=(), count_images=lambda: 16_000)
    assert cfg.train.max_iter == 9000
    multiplier = instantiate(cfg.lr_multiplier)
    assert (multiplier(5999 / 9000), multiplier(6001 / 9000)) == (1.0, 0.1)
    assert cfg.model.distillers[0].detach_iters == 900
    cfg = lazy_parts(L(CosineParamScheduler)(start_value=1.0, end_value=0.0))
    LazySchedule(cfg).apply(epochs=9, batch=None, by_hand=(), count_images=lambda: 16_000)
    assert dict(cfg.lr_multiplier)["end_value"] == 0.0 and cfg.train.max_iter == 9000


def my_scheduler(iterations: int) -> Any:
    return CosineParamScheduler(1.0, 0.0)


def test_apply_schedule_of_a_scheduler_that_is_not_known() -> None:
    cfg = lazy_parts(L(my_scheduler)(iterations=90_000))
    with pytest.raises(ValueError, match=r"lr_multiplier.*my_scheduler") as caught:
        LazySchedule(cfg).apply(epochs=9, batch=None, by_hand=(), count_images=lambda: 16_000)
    for key in ("train.max_iter", "optimizer.lr", "dataloader.train.total_batch_size"):
        assert key in str(caught.value)
    # Without the arguments it is trained as it is.
    assert not LazySchedule(cfg).apply(epochs=None, batch=None, by_hand=(), count_images=lambda: 0)


@pytest.mark.parametrize(
    ("lacking", "asked"), [("train.max_iter", {"epochs": 1.0}), ("optimizer.lr", {"batch": 2})]
)
def test_apply_schedule_of_a_lazy_config_that_lacks_a_key(lacking: str, asked: Any) -> None:
    cfg = lazy_parts(L(CosineParamScheduler)(start_value=1.0, end_value=0.0))
    OmegaConf.update(cfg, lacking, None)
    with pytest.raises(ValueError, match=lacking):
        LazySchedule(cfg).apply(
            **{"epochs": None, "batch": None, **asked}, by_hand=(), count_images=lambda: 8
        )


def test_write_of_what_was_read_changes_nothing() -> None:
    for schedule in (
        YamlSchedule(yaml_config(**OURS)),
        LazySchedule(model_zoo.get_config(LAZY[3])),
    ):
        before = copy.deepcopy(schedule.cfg)
        schedule.write(schedule.read())
        assert schedule.cfg == before
