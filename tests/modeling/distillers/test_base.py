"""The batch that distillers see, and the terms of a config."""

from __future__ import annotations

import pytest
import torch

from ssim_kd.modeling import DistillBatch, Distiller, build_distillers
from tests.helpers import full_config, make_batch
from tests.level_maps import FULL, PADDED

D = "MODEL.DISTILL."


def build_terms(*opts):
    cfg = full_config()
    cfg.merge_from_list([f"{D}{x}" if i % 2 == 0 else x for i, x in enumerate(opts)])
    return build_distillers(cfg)


# DistillBatch


def test_valid_mask_of_padded_images_by_hand() -> None:
    # 57 x 100 pixels at stride 16: rows end at 16, 32, 48, 64, so that four of six see a pixel;
    # columns at 16, ..., 112: seven of eight.
    found = PADDED.valid_mask(6, 8, 16)
    assert found.shape == (2, 6, 8) and found.dtype == torch.bool
    assert found[0].all()
    assert found[1].sum(0).tolist() == [4, 4, 4, 4, 4, 4, 4, 0]
    assert found[1].sum(1).tolist() == [7, 7, 7, 7, 0, 0]
    # Exactly at a cell's edge: 64 x 96 pixels are 4 x 6 cells, and not one more.
    exact = DistillBatch([(64, 96)]).valid_mask(6, 8, 16)
    assert (int(exact[0].any(1).sum()), int(exact[0].any(0).sum())) == (4, 6)
    beyond = DistillBatch([(65, 97)]).valid_mask(6, 8, 16)
    assert beyond[0].any(1).tolist() == [True] * 5 + [False]


def test_valid_mask_without_padding_is_true_everywhere() -> None:
    for batch in (FULL, DistillBatch([(81, 113), (96, 128)])):
        found = batch.valid_mask(6, 8, 16)
        assert found.shape == (2, 6, 8) and found.dtype == torch.bool and found.all()


@pytest.mark.parametrize(
    ("sizes", "padded"),
    [
        ([(96, 128), (96, 128)], False),
        ([(81, 113)], False),  # part of the last row and column is the image's
        ([(80, 128)], True),
        ([(96, 112)], True),
        ([(96, 128), (57, 100)], True),
    ],
)
def test_is_padded_agrees_with_the_mask(sizes, padded) -> None:
    batch = DistillBatch(sizes)
    assert batch.is_padded(6, 8, 16) is padded
    assert bool(batch.valid_mask(6, 8, 16).all()) is not padded


def test_from_inputs_reads_sizes_and_instances() -> None:
    inputs = make_batch()
    batch = DistillBatch.from_inputs(inputs, iteration=7, max_iter=9)
    assert batch.image_sizes == [(96, 128), (64, 96)]
    assert (batch.iteration, batch.max_iter) == (7, 9)
    assert batch.instances is not None
    for found, expected in zip(batch.instances, inputs, strict=True):
        boxes = expected["instances"].gt_boxes.tensor
        assert torch.equal(found.gt_boxes.tensor, boxes)
        assert torch.equal(found.gt_classes, expected["instances"].gt_classes)


def test_from_inputs_without_ground_truth_has_no_instances() -> None:
    inputs = make_batch()
    del inputs[1]["instances"]
    assert DistillBatch.from_inputs(inputs).instances is None


def test_instances_are_on_the_device() -> None:
    batch = DistillBatch.from_inputs(make_batch(), device="meta")
    assert batch.instances is not None
    assert {x.gt_boxes.device.type for x in batch.instances} == {"meta"}


def test_ground_truth_is_the_instances_or_names_the_method() -> None:
    batch = DistillBatch.from_inputs(make_batch())
    assert batch.ground_truth("FGD") is batch.instances
    with pytest.raises(ValueError, match="FGD needs the ground truth") as caught:
        FULL.ground_truth("FGD")
    assert "'instances'" in str(caught.value)


def test_generator_depends_on_seed_iteration_and_names_alone() -> None:
    def draw(*names: str, iteration: int = 7) -> list[float]:
        batch = DistillBatch([(32, 32)], iteration=iteration)
        return torch.rand(3, generator=batch.generator(*names)).tolist()

    torch.manual_seed(3)
    expected = draw("icd")
    torch.rand(1)
    state = torch.get_rng_state()
    assert draw("icd") == expected
    assert torch.equal(torch.get_rng_state(), state)
    others = [draw("icd", iteration=8), draw("icd_2"), draw("icd", "p3")]
    torch.manual_seed(4)
    others.append(draw("icd"))
    assert expected not in others and len({tuple(x) for x in others}) == 4


# The terms of a config


def test_build_distillers_by_name_is_a_single_term() -> None:
    (found,) = build_terms("NAME", "PKDDistiller", "LOSS_WEIGHT", 6.0)
    assert type(found).__name__ == "PKDDistiller"
    assert found.name == "pkd" and found.weight(0.5) == 6.0


def test_build_distillers_of_terms_overrides_their_own_keys_alone() -> None:
    terms = [
        ["SSIMDistiller"],
        ["PKDDistiller", "LOSS_WEIGHT", 6.0, "IN_FEATURES", ["p3"], "PKD.EPS", 0.5],
        ["LpDistiller", "LOSS", "l1"],
    ]
    ssim, pkd, l1 = build_terms("TERMS", terms, "LOSS_WEIGHT", 2.0, "LOSS", "l2")
    assert [x.name for x in (ssim, pkd, l1)] == ["ssim", "pkd", "l1"]
    assert [x.weight(0.0) for x in (ssim, pkd, l1)] == [2.0, 6.0, 2.0]
    assert (ssim.levels, pkd.levels, l1.levels) == (None, ["p3"], None)
    assert pkd.eps == 0.5


def test_build_distillers_of_one_name_numbers_them() -> None:
    terms = [["SSIMDistiller"], ["SSIMDistiller", "SCALING", "none"], ["SSIMDistiller"]]
    assert [x.name for x in build_terms("TERMS", terms)] == ["ssim", "ssim_2", "ssim_3"]


@pytest.mark.parametrize(
    ("terms", "key", "value"),
    [
        ([["Nothing"]], "TERMS", "'Nothing'"),
        ([["SSIMDistiler"]], "TERMS", "SSIMDistiller"),  # the near name is proposed
        ([["SSIMDistiller", "LOSS_WEIGTH", 1.0]], "TERMS", "LOSS_WEIGHT"),
        ([["SSIMDistiller", "LOSS_WEIGHT"]], "TERMS", "LOSS_WEIGHT"),
        ([["SSIMDistiller", "SSIM", 1]], "TERMS", "'SSIM'"),
        ([["SSIMDistiller", "TERMS", []]], "TERMS", "'TERMS'"),
        ([["SSIMDistiller", "SSIM.SIGMA", "wide"]], "TERMS", "SSIM.SIGMA"),
        ([["SSIMDistiller", "SSIM.SIGMA", -1.0]], "SSIM.SIGMA", "-1.0"),
        ([[]], "TERMS", "[]"),
    ],
)
def test_build_distillers_of_a_bad_term_names_key_and_value(terms, key, value) -> None:
    with pytest.raises(ValueError) as caught:
        build_terms("TERMS", terms)
    assert f"MODEL.DISTILL.{key}" in str(caught.value) and value in str(caught.value)


def test_build_distillers_of_an_unknown_name_names_the_known_ones() -> None:
    with pytest.raises(ValueError) as caught:
        build_terms("NAME", "zzz")
    message = str(caught.value)
    assert "MODEL.DISTILL.NAME" in message and "'zzz'" in message and "SSIMDistiller" in message


# Distiller


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), "4", True])
def test_distiller_with_a_bad_weight_names_the_key(weight) -> None:
    with pytest.raises(ValueError) as caught:
        Distiller(name="x", weight=weight)
    assert str(caught.value).startswith("weight is ") and str(weight) in str(caught.value)
