"""The student's class count, the data's, and names for keypoints."""

import pytest
from detectron2.data import MetadataCatalog

from ssim_kd.data.needs import Needs, num_classes, num_classes_key
from ssim_kd.data.validation.classes import (
    check_classes,
    check_keypoint_names,
    check_same_classes,
)


@pytest.mark.parametrize(
    ("meta", "student", "key"),
    [
        ("GeneralizedRCNN", "RetinaNet", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("PanopticFPN", "RetinaNet", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("RetinaNet", "GeneralizedRCNN", "MODEL.RETINANET.NUM_CLASSES"),
        ("DistilledDetector", "GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("DistilledDetector", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES"),
    ],
)
def test_check_classes_key_of_the_student(cfg, meta, student, key):
    cfg.MODEL.META_ARCHITECTURE = meta
    cfg.MODEL.DISTILL.STUDENT_META_ARCHITECTURE = student
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = 7
    cfg.merge_from_list([key, 2])
    assert (num_classes_key(cfg), num_classes(cfg)) == (key, 2)
    check_classes(Needs.from_config(cfg), "here", ["a", "b"])
    with pytest.raises(ValueError, match=rf"here .*3 .*\(a, b, c\).*{key} is 2"):
        check_classes(Needs.from_config(cfg), "here", ["a", "b", "c"])


def test_check_classes_unknown_meta_architecture(cfg):
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    assert num_classes(cfg) is None
    check_classes(Needs.from_config(cfg), "here", ["a"] * 5)
    check_same_classes(Needs.from_config(cfg), {"one": ["a"], "two": ["b"]})


@pytest.mark.parametrize("other", [["b", "a"], ["a"], ["a", "b", "c"], ["a", "c"]])
def test_check_same_classes(cfg, other):
    check_same_classes(Needs.from_config(cfg), {"one": ["a", "b"], "two": ("a", "b")})
    with pytest.raises(ValueError, match="'one' and 'two'"):
        check_same_classes(
            Needs.from_config(cfg), {"one": ["a", "b"], "same": ["a", "b"], "two": other}
        )


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"keypoint_names": ["l", "r", "tip"]},
        {"keypoint_names": ["l", "r"], "keypoint_flip_map": [("l", "r")]},
        {"keypoint_names": ["l", "r", "tip"], "keypoint_flip_map": [("left", "r")]},
    ],
)
def test_check_keypoint_names(cfg, meta):
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 3
    given = MetadataCatalog.get("keypoint_names_of_a_test")
    try:
        given.set(**meta)
        check_keypoint_names(Needs.from_config(cfg), "here", given)
        cfg.MODEL.KEYPOINT_ON = True
        with pytest.raises(ValueError, match=r"here .*keypoint_names.*keypoint_flip_map.*NUM_KEYP"):
            check_keypoint_names(Needs.from_config(cfg), "here", given)
    finally:
        MetadataCatalog.pop(given.name)
    given = MetadataCatalog.get("keypoint_names_of_a_test")
    given.set(keypoint_names=["l", "r", "tip"], keypoint_flip_map=[("l", "r")])
    check_keypoint_names(Needs.from_config(cfg), "here", given)
    MetadataCatalog.pop(given.name)
