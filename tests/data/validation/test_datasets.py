"""Registration from the config, and every fault that ``check_datasets`` names."""

import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ssim_kd.data import check_datasets, register_coco, register_digits
from tests.data.coco_sets import content, write


@pytest.fixture
def use(cfg, tmp_path):
    """Write a data set, register it and make it the training and test set."""

    def _use(data, **options):
        paths = write(tmp_path / "set", data, **options)
        cfg.DATASETS.REGISTER_COCO = [["my_set", *paths]]
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("my_set",)
        register_coco(cfg)
        return cfg

    return _use


def edited(**changes):
    """A faultless file with some fields of its first annotation changed (None: removed)."""
    data = content()
    for key, value in changes.items():
        data["annotations"][0][key] = value
        if value is None:
            del data["annotations"][0][key]
    return data


def test_a_good_set_is_summarised(use):
    data = content(num_images=4)
    data["annotations"] = data["annotations"][:-2]
    data["annotations"][0]["bbox"] = [-4, 2, 10, 10]
    summaries = check_datasets(use(data), train=True)
    assert [s.key for s in summaries] == ["DATASETS.TRAIN", "DATASETS.TEST"]
    assert str(summaries[0]) == (
        "DATASETS.TRAIN: my_set: 4 images, 6 annotations, 2 categories; "
        "1 images without annotations; 1 boxes clipped to their images"
    )
    assert len(check_datasets(use(data), train=False)) == 1


def test_registered_set_is_loaded(use):
    use(content())
    register_coco(use(content()))  # once more does no harm
    dicts = DatasetCatalog.get("my_set")
    assert len(dicts) == 3 and len(dicts[0]["annotations"]) == 2
    assert MetadataCatalog.get("my_set").thing_classes == ["class0", "class1"]


def test_registered_again_with_other_paths(cfg, tmp_path):
    for number in (2, 5):
        paths = write(tmp_path / str(number), content(num_images=number))
        cfg.DATASETS.REGISTER_COCO = [["my_set", *paths]]
        register_coco(cfg)
        assert len(DatasetCatalog.get("my_set")) == number


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([["a", "b"]], r"REGISTER_COCO\[0\] is \['a', 'b'\]: expected \[name, json file"),
        (["abc"], r"REGISTER_COCO\[0\] is 'abc'"),
        ([["a", "b", "c"], ["a", "", "c"]], r"REGISTER_COCO\[1\]"),
        ([["a", "b", "c"], ["a", "x", "c"]], "names 'a' twice"),
        ([["coco_2017_val", "b", "c"]], "'coco_2017_val' is taken"),
    ],
)
def test_bad_registrations(cfg, entries, message):
    cfg.DATASETS.REGISTER_COCO = entries
    with pytest.raises(ValueError, match=message):
        register_coco(cfg)


def test_unknown_set_names_close_ones(use):
    cfg = use(content())
    cfg.DATASETS.TRAIN = ("my_sett",)
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN: data set 'my_sett'.*Close.*my_set"):
        check_datasets(cfg, train=True)


def test_no_training_set(cfg):
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN is empty"):
        check_datasets(cfg, train=True)
    assert check_datasets(cfg, train=False) == []


def test_a_name_in_place_of_a_list(use):
    cfg = use(content())
    cfg.merge_from_list(["DATASETS.TRAIN", ("my_set",)])
    cfg.DATASETS.TRAIN = "my_set"
    with pytest.raises(ValueError, match="expected a list"):
        check_datasets(cfg, train=True)


def test_builtin_set_that_is_not_there(cfg):
    cfg.DATASETS.TRAIN = ("coco_2017_train",)
    with pytest.raises(FileNotFoundError, match=r"instances_train2017\.json.*DETECTRON2_DATASETS"):
        check_datasets(cfg, train=True)


def test_json_missing(use, tmp_path):
    cfg = use(content())
    (tmp_path / "set" / "annotations.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"my_set.*annotations\.json does not exist.*REG"):
        check_datasets(cfg, train=True)


def test_image_folder_missing(cfg, tmp_path):
    json_file, _ = write(tmp_path / "set", content())
    cfg.DATASETS.REGISTER_COCO = [["my_set", json_file, str(tmp_path / "nowhere")]]
    cfg.DATASETS.TEST = ("my_set",)
    register_coco(cfg)
    with pytest.raises(FileNotFoundError, match=r"DATASETS\.TEST.*image folder .*nowhere"):
        check_datasets(cfg, train=False)


def test_first_image_missing(use):
    with pytest.raises(FileNotFoundError, match=r"names the image 0\.png, which is not in"):
        check_datasets(use(content(), pictures=False), train=True)


def test_first_image_of_16_bits(use, tmp_path):
    cfg = use(content())
    deep = np.full((24, 32), 30000, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "set" / "images" / "0.png")
    with pytest.raises(ValueError, match=r"0\.png.*more than 8 bits"):
        check_datasets(cfg, train=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"\(0 bytes\) is not JSON"),
        (json.dumps(content())[:-40], "is not JSON.*cut short"),
        ("[]", "holds a list.*results"),
        ('{"images": [], "annotations": []}', '"images" is empty'),
        ('{"annotations": [], "categories": []}', 'no list "images"'),
        ('{"images": [{"id": 1}], "categories": []}', 'no list "annotations"'),
        ('{"images": [{"id": 1}], "annotations": []}', 'no list "categories"'),
        ('{"images": {}, "annotations": [], "categories": []}', 'no list "images"'),
    ],
)
def test_malformed_files(cfg, tmp_path, text, message):
    (tmp_path / "images").mkdir()
    (tmp_path / "bad.json").write_text(text)
    paths = [str(tmp_path / "bad.json"), str(tmp_path / "images")]
    cfg.DATASETS.REGISTER_COCO = [["my_set", *paths]]
    cfg.DATASETS.TRAIN = ("my_set",)
    register_coco(cfg)
    with pytest.raises(ValueError, match=message) as caught:
        check_datasets(cfg, train=True)
    assert "DATASETS.TRAIN: data set 'my_set'" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": 99}, '1 annotations have a "image_id" of no image in the file.*: 99'),
        ({"image_id": "1"}, "of no image"),
        ({"category_id": 7}, '"category_id" of no category'),
        ({"category_id": None}, '1 of "annotations" have no "category_id"'),
        ({"id": 2}, '1 ids of "annotations" appear more than once.*2'),
        ({"bbox": [1, 2, math.nan, 4]}, "not four finite numbers.*id 1 of image 1"),
        ({"bbox": [1, 2, math.inf, 4]}, "not four finite numbers"),
        ({"bbox": [1, 2, 3]}, "not four finite numbers"),
        ({"bbox": []}, "not four finite numbers"),
        ({"bbox": None}, 'no "bbox"'),
        ({"bbox": "box"}, "not four finite numbers"),
        ({"bbox": [1, 2, -3, 4]}, "of negative width or height"),
        ({"bbox": [1, 2, 0, 4]}, "1 boxes have zero area.*ZERO_AREA_BOXES"),
        ({"bbox": [100, 2, 5, 5]}, "1 boxes have zero area or lie outside"),
        ({"bbox": [-10, 2, 5, 5]}, "1 boxes have zero area or lie outside"),
        ({"ignore": 1}, '"ignore" that is not supported'),
        ({"iscrowd": "0"}, '1 annotations have a "iscrowd" that is neither 0 nor 1.*: 0'),
    ],
)
def test_faulty_annotations(use, changes, message):
    with pytest.raises(ValueError, match=message):
        check_datasets(use(edited(**changes)), train=True)


def for_training(cfg):
    cfg.DATASETS.TEST = ()
    return cfg


@pytest.mark.parametrize("key", ["iscrowd", "area"])
@pytest.mark.parametrize("removed", [True, False])
def test_what_scoring_needs_training_does_not(use, key, removed):
    data = edited(**{key: None})
    if not removed:
        data["annotations"][0][key] = None if key == "area" else False
    if key == "area" or removed:
        with pytest.raises(ValueError, match=rf"TEST.*my_set.*annotations\.json: 1 of 6 .*{key}"):
            check_datasets(use(data), train=True)
    check_datasets(for_training(use(data)), train=True)
    del data["annotations"]
    check_datasets(use(data), train=False)


def test_a_message_says_all_that_scoring_lacks(use):
    data = content()
    for annotation in data["annotations"]:
        del annotation["iscrowd"], annotation["area"]
    expected = r'"iscrowd".*id 1 of image 1.*add "iscrowd": 0\. 6 of 6.*add "area" in pixels'
    with pytest.raises(ValueError, match=expected):
        check_datasets(use(data), train=False)


@pytest.mark.parametrize(
    ("segmentation", "training", "scoring"),
    [
        (None, False, False),
        ([], False, False),
        ([[1, 2, 3, 4]], True, False),
        ([[1, 1, 5, 1, 5, 5]], True, True),
        ({"counts": [0, 768], "size": [24, 32]}, True, True),
    ],
)
def test_masks(use, segmentation, training, scoring):
    data = content()
    for annotation in data["annotations"]:
        annotation["segmentation"] = [[1, 1, 5, 1, 5, 5]]
    data["annotations"][1]["segmentation"] = segmentation
    if segmentation is None:
        del data["annotations"][1]["segmentation"]
    cfg = use(data)
    check_datasets(cfg, train=True)
    cfg.MODEL.MASK_ON = True
    message = r'1 of 6 annotations have no usable "segmentation" \(.*id 2 of.*MASK_ON is True'
    with nullcontext() if scoring else pytest.raises(ValueError, match=message):
        check_datasets(cfg, train=False)
    with nullcontext() if training else pytest.raises(ValueError, match=message):
        check_datasets(for_training(cfg), train=True)
    # RetinaNet has no masks, and crowds are not trained on.
    data["annotations"][1]["iscrowd"] = 1
    cfg = for_training(use(data))
    check_datasets(cfg, train=True)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RETINANET.NUM_CLASSES = "RetinaNet", 2
    cfg.DATASETS.TEST = ("my_set",)
    check_datasets(cfg, train=True)


def test_no_polygon_at_all(use):
    data = content()
    for annotation in data["annotations"]:
        annotation["segmentation"] = [[]]
    with pytest.raises(ValueError, match="polygons of all 6 annotations have fewer than three"):
        check_datasets(for_training(use(data)), train=True)


@pytest.mark.parametrize(
    ("title", "key", "value", "message"),
    [
        ("images", "file_name", 5, r'1 of "images" have a "file_name" that is no text .*id 2: 5'),
        ("images", "file_name", ..., r'1 of "images" have no "file_name" \(.*number 1'),
        ("categories", "name", None, r'"categories" have a "name" that is no text .*id 2: None'),
        ("categories", "name", 7, r'"categories" have a "name" that is no text .*id 2: 7'),
    ],
)
def test_names_that_are_no_text(use, title, key, value, message):
    data = content()
    data[title][1][key] = value
    if value is ...:
        del data[title][1][key]
    with pytest.raises(ValueError, match=message):
        check_datasets(use(data, pictures=False), train=True)


def test_lvis_has_keys_of_its_own(use):
    data = content()
    for row in [*data["images"], *data["annotations"]]:
        row.pop("file_name", None), row.pop("iscrowd", None)
    cfg = use(data, pictures=False)
    meta = MetadataCatalog.get("my_set")
    meta.__dict__["evaluator_type"] = "lvis"  # which cannot be set anew otherwise
    check_datasets(cfg, train=True)


def test_several_faults_in_one_message(use):
    data = edited(image_id=99)
    data["annotations"][1]["bbox"] = [0, 0, -1, 1]
    with pytest.raises(ValueError, match=r"no image in the file.*negative width"):
        check_datasets(use(data), train=True)


def test_faulty_images(use):
    data = content()
    data["images"][1]["id"] = 1
    with pytest.raises(ValueError, match=r'1 ids of "images" appear more than once'):
        check_datasets(use(data), train=True)
    data = content()
    data["images"][2].update(width=0)
    with pytest.raises(ValueError, match=r"width or height that is not a positive number.*id 3"):
        check_datasets(use(data, pictures=False), train=True)
    data = content()
    del data["images"][2]["height"]
    with pytest.raises(ValueError, match=r'1 of "images" have no "height".*number 2'):
        check_datasets(use(data, pictures=False), train=True)


def test_no_annotations_at_all(use):
    data = content()
    data["annotations"] = []
    with pytest.raises(ValueError, match='"annotations" is empty'):
        check_datasets(use(data), train=True)


def test_test_set_without_ground_truth(use):
    data = content()
    del data["annotations"]
    (summary,) = check_datasets(use(data), train=False)
    assert "not scored" in str(summary)


def test_zero_area_is_an_error_in_training_alone(use):
    data = edited(bbox=[1, 1, 0, 5])
    (summary,) = check_datasets(use(data), train=False)
    assert "1 boxes of zero area kept in the evaluation" in str(summary)
    cfg = use(data)
    cfg.DATASETS.ZERO_AREA_BOXES = "drop"
    assert "1 boxes of zero area left out" in str(check_datasets(cfg, train=True)[0])
    cfg.DATASETS.ZERO_AREA_BOXES = "ignore"
    with pytest.raises(ValueError, match=r"ZERO_AREA_BOXES is 'ignore': expected one of error"):
        check_datasets(cfg, train=True)


def test_every_box_of_zero_area(use):
    data = content()
    for annotation in data["annotations"]:
        annotation["bbox"] = [1, 1, 0, 0]
    cfg = use(data)
    cfg.DATASETS.ZERO_AREA_BOXES = "drop"
    with pytest.raises(ValueError, match="all 6 boxes have zero area"):
        check_datasets(cfg, train=True)


@pytest.mark.parametrize(
    ("meta", "student", "key"),
    [
        ("GeneralizedRCNN", "RetinaNet", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("RetinaNet", "GeneralizedRCNN", "MODEL.RETINANET.NUM_CLASSES"),
        ("DistilledDetector", "GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("DistilledDetector", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES"),
    ],
)
def test_class_count_is_the_students(use, meta, student, key):
    cfg = use(content())
    cfg.MODEL.META_ARCHITECTURE = meta
    cfg.MODEL.DISTILL.STUDENT_META_ARCHITECTURE = student
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = 7
    cfg.merge_from_list([key, 2])
    check_datasets(cfg, train=True)
    cfg.merge_from_list([key, 3])
    with pytest.raises(ValueError, match=rf"2 categories \(class0, class1\), but {key} is 3"):
        check_datasets(cfg, train=True)


def test_unknown_meta_architecture_has_no_class_count(use):
    cfg = use(content(num_classes=5))
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    check_datasets(cfg, train=True)


def test_sets_with_other_class_order(cfg, tmp_path):
    first, second = content(), content()
    second["categories"][0]["name"], second["categories"][1]["name"] = "class1", "class0"
    cfg.DATASETS.REGISTER_COCO = [
        ["set_a", *write(tmp_path / "a", first)],
        ["set_b", *write(tmp_path / "b", second)],
    ]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("set_a",), ("set_b",)
    register_coco(cfg)
    with pytest.raises(ValueError, match="'set_a' and 'set_b' have different categories"):
        check_datasets(cfg, train=True)


def test_ids_may_be_text(use):
    data = content()
    for image in data["images"]:
        image["id"] = f"i{image['id']}"
    for annotation in data["annotations"]:
        annotation["image_id"] = f"i{annotation['image_id']}"
    assert check_datasets(use(data), train=True)[0].findings.images == 3


def test_other_kinds_of_sets(cfg):
    DatasetCatalog.register("plain", lambda: [{"file_name": "a"}])
    cfg.DATASETS.TEST = ("plain",)
    assert "not checked" in str(check_datasets(cfg, train=False)[0])


def test_digits_are_made_by_the_check(cfg):
    digits = cfg.DATASETS.DIGITS
    digits.IMAGE_SIZE, digits.DIGIT_SIZE, digits.NUM_IMAGES = 48, (14, 20), (2, 2, 2)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 10
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ("digits_val",)
    register_digits(cfg)
    assert [s.findings.images for s in check_datasets(cfg, train=True)] == [2, 2]


def test_double_ids_of_cocos_own_minival_are_admitted(cfg, tmp_path):
    data = edited(id=2)
    json_file, root = write(tmp_path / "set", data)
    minival = tmp_path / "instances_minival2014.json"
    minival.write_text(json.dumps(data))
    cfg.DATASETS.REGISTER_COCO = [["my_minival", str(minival), root], ["mine", json_file, root]]
    register_coco(cfg)
    cfg.DATASETS.TEST = ("my_minival",)
    check_datasets(cfg, train=False)
    cfg.DATASETS.TEST = ("mine",)
    with pytest.raises(ValueError, match="more than once"):
        check_datasets(cfg, train=False)
