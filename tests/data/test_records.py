"""Records made from json files: what Detectron2's reader makes, in every process."""

import json

import numpy as np
import pytest
import torch.multiprocessing as mp
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import load_coco_json
from pycocotools import mask as mask_util

from ssim_kd.data import Needs, check_datasets, count_classes, count_images, register_coco
from ssim_kd.data.json_file import read_instances
from ssim_kd.data.records import Records, concatenate, records_of, shared
from ssim_kd.data.samplers import aspect_groups
from ssim_kd.data.training_sets import train_records
from tests.data.coco_sets import content, write
from tests.faults.store import store

POINTS = [5, 5, 2, 9.5, 5, 1, 7, 9, 0]
RLE = {**mask_util.encode(np.ones((24, 32), dtype=np.uint8, order="F"))}


def every_kind():
    """Ids in no order, and objects with all that Detectron2 reads or leaves out."""
    data = content(num_images=12, num_classes=3, sizes=((32, 24), (24, 32)))
    masks = [[[1, 1, 9, 1, 9, 9]], [[1, 1, 9, 1, 9, 9], [1, 2]], [[1, 2]], [], None]
    masks += [{"size": [24, 32], "counts": [100, 20, 648]}]
    masks += [{**RLE, "counts": RLE["counts"].decode()}]
    for number, annotation in enumerate(data["annotations"]):
        annotation["iscrowd"] = int(number % 5 == 0)
        if number % 3:
            annotation["segmentation"] = masks[number % len(masks)]
        if number % 4:
            annotation["keypoints"] = POINTS if number % 8 else []
        annotation["bbox"] = [float(v) if number % 2 else v for v in annotation["bbox"]]
        annotation["extra"] = {"attributes": {"a": [1, {"b": 2}]}}
    data["images"].reverse()
    for row, key in [(c, "id") for c in data["categories"]] + [
        (a, "category_id") for a in data["annotations"]
    ]:
        row[key] = row[key] * 7 % 11
    for annotation in data["annotations"]:
        if annotation["image_id"] == 5:
            annotation["iscrowd"] = 1
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] != 3]
    return data


@pytest.fixture
def loaded(use):
    cfg = use(every_kind())
    return MetadataCatalog.get("my_set").json_file, cfg


def test_records_of_is_load_coco_json(loaded):
    json_file, _ = loaded
    expected = load_coco_json(json_file, "root", "my_set")
    records = records_of(read_instances("here", json_file, annotated=True), "root", "my_set")
    assert (
        list(records) == expected and records[-1] == expected[-1] and records[2:4] == expected[2:4]
    )
    types = [
        [type(v) for a in r["annotations"] for v in [*a.values(), *a["bbox"]]] for r in records
    ]
    order = [sorted(a) for a in records[0]["annotations"]]
    assert order == [sorted(a) for a in expected[0]["annotations"]]
    assert {t for row in types for t in row} >= {int, float, list}
    meta = MetadataCatalog.get("my_set")
    names, ids = records.sets["my_set"]
    assert names == meta.thing_classes
    assert dict(zip(ids, range(3), strict=True)) == meta.thing_dataset_id_to_contiguous_id


@pytest.mark.parametrize("options", [{}, {"filter_empty": False}, {"min_keypoints": 3}])
def test_train_records_are_detectron2s(loaded, options):
    expected = get_detection_dataset_dicts("my_set", **options)
    records = train_records("my_set", **options)
    assert isinstance(records, Records) and list(records) == expected
    assert records.names == [record["file_name"] for record in expected]
    assert aspect_groups(records).tolist() == aspect_groups(expected).tolist()


def test_records_written_and_joined(loaded, tmp_path):
    records = train_records("my_set")
    records.write(str(tmp_path))
    again = Records.map(str(tmp_path))
    assert list(again) == list(records) and again.sets == records.sets
    two = concatenate([records, again.chosen(np.arange(len(records)) % 2 == 0)])
    assert list(two) == [*records, *list(records)[::2]]
    assert [two.classes[r["first"] : r["last"]].tolist() for r in two.rows] == [
        [a["category_id"] for a in record["annotations"]] for record in two
    ]


def _rank(rank, url, json_file, folder):
    import torch.distributed as dist
    from detectron2.utils import comm

    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=2)

    def read():
        return records_of(read_instances("here", json_file, annotated=True), "root", "my_set")

    def make():
        assert rank == 0
        return read()

    assert len(shared(read)) == 6  # code that starts processes may make no group of a machine's
    comm._LOCAL_PROCESS_GROUP = dist.group.WORLD
    records = shared(make)
    assert records is not None
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump([len(records), records[3]["file_name"], records.names], file)
    with pytest.raises(ValueError, match="no such"):
        shared(lambda: (_ for _ in ()).throw(ValueError("no such")))
    dist.destroy_process_group()


def test_records_shared_by_processes(tmp_path):
    json_file, _ = write(tmp_path, content(num_images=6))
    mp.spawn(_rank, (f"file://{tmp_path}/store", json_file, str(tmp_path)), nprocs=2)
    first, second = ((tmp_path / f"{rank}.json").read_text() for rank in (0, 1))
    assert first == second and json.loads(first)[0] == 6


def test_json_file_is_read_once(use, monkeypatch):
    cfg = use(content())
    calls = []

    def counted(where, path, **options):
        calls.append(path)
        return read_instances(where, path, **options)

    monkeypatch.setattr("ssim_kd.data.validation.json_sets.read_instances", counted)
    needs = Needs.from_config(cfg)
    assert count_images(needs) == 3
    check_datasets(needs, train=True)
    assert len(train_records("my_set")) == 3 and count_images(needs) == 3
    assert len(calls) == 1
    use(content(num_images=5))  # the file is another one
    assert count_images(needs) == 5 and len(calls) == 2


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(content()),
        json.dumps(content(), indent=1),
        json.dumps(content()).replace('":', '" :'),
        json.dumps(content()).replace('"class0"', '"\\":"'),
        json.dumps(content()).replace('"area": 30', '"area": NaN'),
        json.dumps(content()).replace('"area": 30', f'"area": {2**70}'),
        json.dumps(every_kind()),
    ],
)
def test_read_instances_is_json(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    found = read_instances("here", str(path), annotated=True)
    assert repr(found) == repr(json.loads(text))
    assert count_classes(str(path)) == len(found["categories"])


def test_messages_hold_no_query_of_a_signed_url(cfg, tmp_path):
    with store(tmp_path) as root:
        (root / "a.json").write_text(json.dumps(content()).replace('"id": 1,', '"id": 2,', 1))
        (root / "cut.json").write_text("[")
        for name in ("a", "cut"):
            url = f"store://{name}.json?sig=SECRET"
            cfg.DATASETS.REGISTER_COCO = [[f"remote_{name}", url, "store://images"]]
            cfg.DATASETS.TRAIN = (f"remote_{name}",)
            register_coco(cfg)
            with pytest.raises(ValueError, match=f"store://{name}") as error:
                check_datasets(cfg, train=True)
            assert "SECRET" not in str(error.value)


@pytest.mark.parametrize("value", ["[" * 100000, "9" * 5000, '{"a":' * 100000])
def test_read_instances_hostile(tmp_path, value):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content())[:-1] + f', "x": {value}}}')
    with pytest.raises(ValueError, match=r"here: .*a\.json .*is not JSON"):
        read_instances("here", str(path), annotated=True)
