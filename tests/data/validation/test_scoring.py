"""The TEST keys, before anything is built."""

import pytest

from ssim_kd.data.needs import Needs
from ssim_kd.data.validation.scoring import check_test_keys


@pytest.fixture
def tested(cfg):
    cfg.DATASETS.TEST = ("some_set",)
    return cfg


@pytest.mark.parametrize("limit", [0, -1])
def test_check_test_keys_detections_per_image(tested, limit):
    tested.TEST.DETECTIONS_PER_IMAGE = limit
    with pytest.raises(ValueError, match=rf"TEST\.DETECTIONS_PER_IMAGE is {limit}: expected"):
        check_test_keys(Needs.from_config(tested))
    tested.DATASETS.TEST = ()
    check_test_keys(Needs.from_config(tested))


@pytest.mark.parametrize(
    ("sigmas", "count", "fits"),
    [
        ([], 17, True),
        ([0.1] * 3, 3, True),
        ([], 3, False),
        ([0.1] * 2, 3, False),
        ([0.1, 0.0, 0.1], 3, False),
        ([0.1, float("nan"), 0.1], 3, False),
    ],
)
def test_check_test_keys_sigmas(tested, sigmas, count, fits):
    tested.TEST.KEYPOINT_OKS_SIGMAS = sigmas
    tested.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = count
    check_test_keys(Needs.from_config(tested))  # no keypoints are predicted
    tested.MODEL.KEYPOINT_ON = True
    if fits:
        check_test_keys(Needs.from_config(tested))
        return
    with pytest.raises(ValueError, match=rf"TEST\.KEYPOINT_OKS_SIGMAS is .*expected {count} "):
        check_test_keys(Needs.from_config(tested))


@pytest.mark.parametrize(
    "row",
    [
        ["bbox", "AP", 38.5],
        ["bbox", "AP", "38.5", 0.2],
        ["bbox", "AP", float("nan"), 0.2],
        ["box", "AP", 38.5, 0.2],
        ["AP", "bbox", 38.5, 0.2],
        "bbox",
    ],
)
def test_check_test_keys_expected_results(tested, row):
    good = ["bbox", "AP", 38.5, 0.2], ["segm_TTA", "AP50", 3, 1]
    tested.TEST.EXPECTED_RESULTS = [*good]
    check_test_keys(Needs.from_config(tested))
    tested.TEST.EXPECTED_RESULTS = [*good, row]
    with pytest.raises(ValueError, match=r"TEST\.EXPECTED_RESULTS .*expected \[task, metric"):
        check_test_keys(Needs.from_config(tested))


def test_check_test_keys_expected_results_of_two_sets(tested):
    tested.DATASETS.TEST = ("a", "b")
    check_test_keys(Needs.from_config(tested))
    tested.TEST.EXPECTED_RESULTS = [["bbox", "AP", 38.5, 0.2]]
    with pytest.raises(ValueError, match=r"TEST\.EXPECTED_RESULTS .*DATASETS\.TEST has 2"):
        check_test_keys(Needs.from_config(tested))
