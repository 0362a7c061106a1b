"""``check_datasets``: sets of json files and of code, refused or noted before anything is built."""

import json
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances, register_pascal_voc
from detectron2.data.datasets.lvis import register_lvis_instances
from detectron2.structures import BoxMode

from ssim_kd.data import Needs, check_datasets, count_images, register_coco, register_digits
from tests.data.coco_sets import content, edited, write


def refused(cfg, *words, train=True, error=ValueError):
    """The error of the check, which has all the words."""
    with pytest.raises(error) as caught:
        check_datasets(cfg, train=train)
    message = str(caught.value)
    assert not [word for word in words if word not in message], message
    return message


def test_check_datasets_summary(use):
    data = content(num_images=4)
    data["annotations"] = data["annotations"][:-2]
    data["annotations"][0]["bbox"] = [-4, 2, 10, 10]
    data["annotations"][0]["area"] = 60
    summaries = check_datasets(use(data), train=True)
    assert [s.key for s in summaries] == ["DATASETS.TRAIN", "DATASETS.TEST"]
    assert str(summaries[0]) == (
        "DATASETS.TRAIN: my_set: 4 images, 6 annotations, 2 categories; "
        "1 images without annotations; 1 boxes clipped to their images"
    )
    assert len(check_datasets(use(data), train=False)) == 1


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("my_sett",), ["DATASETS.TRAIN: data set 'my_sett'", ": my_set"]),
        ((), ["DATASETS.TRAIN is empty"]),
        ("my_set", ["DATASETS.TRAIN is 'my_set'", "('my_set',)"]),
    ],
)
def test_check_datasets_names(use, names, words):
    cfg = use(content())
    cfg.DATASETS.TRAIN = names
    refused(cfg, *words)
    assert len(check_datasets(cfg, train=False)) == 1


def test_check_datasets_builtin_set_not_there(cfg):
    cfg.DATASETS.TRAIN = ("coco_2017_train",)
    refused(cfg, "instances_train2017.json", "DETECTRON2_DATASETS", error=FileNotFoundError)
    cfg.DATASETS.TRAIN = ("voc_2007_trainval",)
    refused(cfg, "VOC2007", "DETECTRON2_DATASETS", error=FileNotFoundError)


def test_check_datasets_json_missing(use, tmp_path):
    cfg = use(content())
    (tmp_path / "set" / "annotations.json").unlink()
    refused(cfg, "'my_set'", "annotations.json", "REGISTER_COCO", error=FileNotFoundError)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["0 bytes", "is not JSON"]),
        (json.dumps(content())[:-40], ["is not JSON"]),
        ("\ufeff" + json.dumps(content()), ["is not JSON", "BOM"]),
        ("[]", ["holds a list"]),
        ('{"images": [], "annotations": []}', ['"images" is empty']),
        ('{"annotations": [], "categories": []}', ['no list "images"']),
        ('{"images": [{"id": 1}], "categories": []}', ['no list "annotations"']),
        ('{"images": [{"id": 1}], "annotations": []}', ['no list "categories"']),
        ('{"images": {}, "annotations": [], "categories": []}', ['no list "images"']),
        (json.dumps(content())[:-1] + ', "annotations": []}', ['key "annotations" twice']),
        (
            json.dumps(content()).replace('"id": 5, ', '"id": 5, "bbox": [0, 0, 9, 9], '),
            ['key "bbox" twice', "id 5"],
        ),
    ],
)
def test_check_datasets_malformed_file(cfg, tmp_path, text, words):
    (tmp_path / "images").mkdir()
    (tmp_path / "bad.json").write_text(text)
    cfg.DATASETS.REGISTER_COCO = [["my_set", str(tmp_path / "bad.json"), str(tmp_path / "images")]]
    cfg.DATASETS.TRAIN = ("my_set",)
    register_coco(cfg)
    refused(cfg, "DATASETS.TRAIN: data set 'my_set'", "bad.json", *words)


def test_check_datasets_names_key_set_and_file(use):
    refused(use(edited(category_id=7)), "DATASETS.TRAIN", "'my_set'", "annotations.json", "7")


def test_check_datasets_without_ground_truth(use):
    data = content()
    del data["annotations"]
    (summary,) = check_datasets(use(data), train=False)
    assert "not scored" in str(summary)
    refused(use(data), 'no list "annotations"')


@pytest.mark.parametrize("kind", ["none", "crowds"])
def test_check_datasets_nothing_to_learn_or_score(use, cfg, tmp_path, kind):
    data = content()
    for annotation in data["annotations"]:
        annotation["iscrowd"] = 1
    if kind == "none":
        data["annotations"] = []
    cfg = use(data)
    refused(cfg, "DATASETS.TEST", "'my_set'", "NaN", train=False)
    cfg.DATASETS.TEST = ()
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN: data set 'my_set': no image"):
        count_images(Needs.from_config(cfg))
    # Next to objects, a set of background is a training set like any other.
    cfg.DATASETS.REGISTER_COCO = [
        ["my_set", *write(tmp_path / "set", data)],
        ["objects", *write(tmp_path / "objects", content())],
    ]
    cfg.DATASETS.TRAIN = ("my_set", "objects")
    register_coco(cfg)
    check_datasets(cfg, train=True)


def test_check_datasets_zero_area(use):
    data = edited(bbox=[1, 1, 0, 5], area=0)
    (summary,) = check_datasets(use(data), train=False)
    assert "1 boxes of zero area kept in the evaluation" in str(summary)
    cfg = use(data)
    refused(cfg, "1 boxes", "DATASETS.ZERO_AREA_BOXES")
    cfg.DATASETS.ZERO_AREA_BOXES = "drop"
    assert "1 boxes of zero area left out" in str(check_datasets(cfg, train=True)[0])


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("DATASETS.ZERO_AREA_BOXES", "ignore", "'error', 'drop'"),
        ("INPUT.MASK_FORMAT", "Polygon", "'polygon', 'bitmask'"),
    ],
)
def test_check_datasets_choices(use, key, value, expected):
    cfg = use(content())
    cfg.MODEL.MASK_ON = True
    cfg.merge_from_list([key, value])
    refused(cfg, f"{key} is {value!r}", expected)


def test_check_datasets_may_repeat_ids(cfg, tmp_path):
    data = edited(id=2)
    json_file, root = write(tmp_path / "set", data)
    minival = tmp_path / "instances_minival2014.json"
    minival.write_text(json.dumps(data))
    cfg.DATASETS.REGISTER_COCO = [["my_minival", str(minival), root], ["mine", json_file, root]]
    register_coco(cfg)
    cfg.DATASETS.TEST = ("my_minival",)
    check_datasets(cfg, train=False)
    cfg.DATASETS.TEST = ("mine",)
    refused(cfg, "more than once", train=False)


def test_check_datasets_makes_the_digits(cfg):
    digits = cfg.DATASETS.DIGITS
    digits.IMAGE_SIZE, digits.DIGIT_SIZE, digits.NUM_IMAGES = 48, (14, 20), (2, 2, 2)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 10
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ("digits_val",)
    register_digits(cfg)
    assert [s.findings.images for s in check_datasets(cfg, train=True)] == [2, 2]


def test_check_datasets_lvis_with_some_of_the_categories(cfg, tmp_path):
    """Detectron2 reads the classes of the version, and numbers a file's by id - 1."""
    data = content()
    for row, key in [(c, "id") for c in data["categories"]] + [
        (a, "category_id") for a in data["annotations"]
    ]:
        row[key] += 600
    for image in data["images"]:
        image["coco_url"] = f"http://images/{image.pop('file_name')}"
    (tmp_path / "lvis.json").write_text(json.dumps(data))
    register_lvis_instances("part_lvis_v1", {}, str(tmp_path / "lvis.json"), str(tmp_path))
    cfg.DATASETS.TRAIN = ("part_lvis_v1",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1203
    assert len(check_datasets(cfg, train=True)[0].classes) == 1203
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    refused(cfg, "'part_lvis_v1'", "1203", "NUM_CLASSES is 2")
    data["annotations"][0]["id"] = 0
    (tmp_path / "lvis.json").write_text(json.dumps(data))
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    refused(cfg, "DATASETS.TEST", '"id"', "id 0", train=False)
    data["categories"][0]["id"] = 1204
    data["annotations"] = data["annotations"][1::2]
    (tmp_path / "lvis.json").write_text(json.dumps(data))
    refused(cfg, "'part_lvis_v1'", '"categories"', "1204")


def test_check_datasets_metadata_in_another_order(cfg, tmp_path):
    """Detectron2's reader fails at this by a bare assertion."""
    paths = write(tmp_path / "set", content())
    register_coco_instances("my_set", {"thing_classes": ["class1", "class0"]}, *paths)
    cfg.DATASETS.TRAIN = ("my_set",)
    refused(cfg, "'my_set'", "thing_classes", "['class1', 'class0']", "['class0', 'class1']")


def by_code(name, categories=(0, 1), classes=("a", "b"), **meta):
    """Register records, as a user's script does; one image a category."""

    def records():
        return [
            {
                "file_name": f"{i}.png",
                "image_id": i + 1,
                "height": 24,
                "width": 32,
                "annotations": [
                    {"bbox": [1, 2, 5, 6], "bbox_mode": BoxMode.XYWH_ABS, "category_id": category}
                ],
            }
            for i, category in enumerate(categories)
        ]

    DatasetCatalog.register(name, records)
    if classes:
        meta["thing_classes"] = list(classes)
    MetadataCatalog.get(name).set(**meta)
    return name


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
@pytest.mark.parametrize("classes", [4, 1, 80])
def test_check_datasets_classes_of_code(cfg, key, classes):
    cfg.DATASETS.TRAIN = (by_code("good"),)
    cfg.DATASETS[key] = (by_code("mine", range(classes), [f"c{i}" for i in range(classes)]),)
    refused(
        cfg, f"DATASETS.{key}: data set 'mine'", f"{classes} ", "MODEL.ROI_HEADS.NUM_CLASSES is 2"
    )
    cfg.DATASETS[key] = ("good",)
    summary = check_datasets(cfg, train=True)[0]
    assert "good: 2 images, 2 annotations, 2 categories" in str(summary)


@pytest.mark.parametrize("other", [("b", "a"), ("a", "c")])
def test_check_datasets_order_of_classes_of_code(cfg, other):
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (by_code("one"),), (by_code("two", classes=other),)
    refused(cfg, "'one' and 'two'", "class")
    cfg.DATASETS.TRAIN = ("one", "two")
    cfg.DATASETS.TEST = ()
    refused(cfg, "'one' and 'two'")


@pytest.mark.parametrize("classes", [("a", "b"), ()])
@pytest.mark.parametrize(
    ("category", "words"),
    [(2, ["out of [0, 2)", ": 2"]), (-1, ["out of [0, 2)"]), (0.5, ["whole"]), (None, ["None"])],
)
def test_check_datasets_category_of_code(cfg, classes, category, words):
    cfg.DATASETS.TRAIN = (by_code("mine", (0, 1, category), classes),)
    refused(cfg, "'mine'", '"category_id"', "record 2", *words)


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_check_datasets_reader_of_code_fails(cfg, key):
    def reader():
        raise FileNotFoundError("labels.csv")

    DatasetCatalog.register("mine", reader)
    cfg.DATASETS.TRAIN = (by_code("good"),)
    cfg.DATASETS[key] = ("mine",)
    refused(cfg, f"DATASETS.{key}: data set 'mine'", "FileNotFoundError", "labels.csv")


def test_check_datasets_voc(cfg, tmp_path):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/val.txt").write_text("0\n1\n")
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    for i in range(2):
        (tmp_path / f"Annotations/{i}.xml").write_text(
            "<annotation><size><width>32</width><height>24</height></size>"
            f"<object><name>cat</name>{box}</object></annotation>"
        )
    for name, classes in (("own_voc", ["dog", "cat"]), ("other_voc", ["dog", "cow"])):
        register_pascal_voc(name, str(tmp_path), "val", 2007, classes)
        MetadataCatalog.get(name).set(evaluator_type="pascal_voc")
    cfg.DATASETS.TEST = ("own_voc",)
    assert "2 images, 2 annotations, 2 categories" in str(check_datasets(cfg, train=False)[0])
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    refused(cfg, "'own_voc'", "2 ", "NUM_CLASSES is 3", train=False)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.DATASETS.TEST = ("other_voc",)
    refused(cfg, "'other_voc'", "'cat' is not in list", train=False)


def test_check_datasets_cityscapes_classes(cfg, tmp_path, monkeypatch):
    """Detectron2's reader takes minutes: only the metadata is looked at."""
    meta = MetadataCatalog.get("cityscapes_fine_instance_seg_val")
    cfg.DATASETS.TEST = (meta.name,)
    monkeypatch.chdir(tmp_path)
    folder = Path(meta.image_dir)
    folder.mkdir(parents=True)
    refused(cfg, meta.name, "8 ", "NUM_CLASSES is 2", train=False)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 8
    assert "not checked" in str(check_datasets(cfg, train=False)[0])


def test_check_datasets_stuff_classes(cfg):
    DatasetCatalog.register("stuff", lambda: [{"file_name": "a", "sem_seg_file_name": "b"}])
    MetadataCatalog.get("stuff").set(evaluator_type="sem_seg", stuff_classes=["a", "b", "c"])
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("stuff",)
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    refused(cfg, "'stuff'", "3 stuff_classes", "MODEL.SEM_SEG_HEAD.NUM_CLASSES is 54")
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    check_datasets(cfg, train=True)


def with_ground_truth(tmp_path, **change):
    """Records of code next to a json file, which is only ground truth."""
    json_file, root = write(tmp_path / "set", content())

    def records():
        found = load_coco_json(json_file, root)
        for annotation in [a for record in found for a in record["annotations"]]:
            annotation["category_id"] -= 1
        return found

    meta = {
        "json_file": json_file,
        "thing_classes": ["class0", "class1"],
        "thing_dataset_id_to_contiguous_id": {1: 0, 2: 1},
    }
    DatasetCatalog.register("mine", records)
    MetadataCatalog.get("mine").set(**(meta | change))
    return ("mine",)


@pytest.mark.parametrize("more", [{}, {"image_root": "images.zip"}])
def test_check_datasets_json_file_of_code(cfg, tmp_path, more):
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = with_ground_truth(tmp_path, **more)
    for _ in range(2):
        assert "3 images, 6 annotations" in str(check_datasets(cfg, train=True)[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"thing_dataset_id_to_contiguous_id": {1: 1, 2: 0}}, ["class1", "class0"]),
        ({"thing_dataset_id_to_contiguous_id": {}}, ["thing_dataset_id_to_contiguous_id={1: 0"]),
        ({"thing_dataset_id_to_contiguous_id": {1: 1, 2: 2}}, ["contiguous_id={1: 0, 2: 1}"]),
        ({"thing_classes": ["class1", "class0"]}, ["class1", "class0"]),
    ],
)
def test_check_datasets_json_file_of_code_with_other_classes(cfg, tmp_path, change, words):
    cfg.DATASETS.TEST = with_ground_truth(tmp_path, **change)
    refused(cfg, "'mine'", "annotations.json", *words, train=False)


def test_check_datasets_json_file_of_code_with_other_images(cfg, tmp_path):
    json_file, _ = write(tmp_path / "set", content(num_images=1))
    by_code("mine", json_file=json_file, thing_dataset_id_to_contiguous_id={1: 0, 2: 1})
    cfg.DATASETS.TEST = ("mine",)
    refused(cfg, "'mine'", '"image_id"', "1 of the 2", "2", train=False)


def test_check_datasets_after_a_conversion_by_detectron2(cfg, tmp_path):
    """The second run of a process, the folder of the first of which is gone."""
    by_code("mine", json_file=str(tmp_path / "gone" / "mine_coco_format.json"))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("mine",)
    assert len(check_datasets(cfg, train=True)) == 2


def test_check_datasets_code_without_classes_in_test(cfg):
    cfg.DATASETS.TEST = (by_code("mine", classes=()),)
    refused(cfg, "'mine'", "thing_classes", train=False)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("mine",), ()
    check_datasets(cfg, train=True)


class Stream:
    """A custom data set, of which nothing is known."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return index


def test_check_datasets_code_that_returns_no_list(cfg):
    DatasetCatalog.register("mine", Stream)
    cfg.DATASETS.TRAIN = ("mine",)
    assert "not checked" in str(check_datasets(cfg, train=True)[0])


def test_check_datasets_own_loader(cfg):
    cfg.DATASETS.TRAIN = ()
    assert check_datasets(cfg, train=True, own_loader=True) == []
    cfg.DATASETS.TRAIN = ("a folder", by_code("mine"))
    (summary,) = check_datasets(cfg, train=True, own_loader=True)
    assert summary.name == "mine"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    with pytest.raises(ValueError, match="'mine'"):
        check_datasets(cfg, train=True, own_loader=True)


def test_check_datasets_own_evaluator(cfg, use):
    DatasetCatalog.register("arrays", lambda: [{"image": 1, "annotations": []}])
    cfg.DATASETS.TEST = ("arrays",)
    refused(cfg, "'arrays'", "image_id", train=False)
    check_datasets(cfg, train=False, own_evaluator=True)
    cfg = use(edited(area=None, iscrowd=None))
    cfg.TEST.DETECTIONS_PER_IMAGE = -1
    refused(cfg, "TEST.DETECTIONS_PER_IMAGE", train=False)
    check_datasets(cfg, train=False, own_evaluator=True)
