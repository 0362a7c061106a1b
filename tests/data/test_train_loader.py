"""The training loader: order, exact resume, workers, ranks, and images that cannot be read."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from PIL import Image

from ssim_kd.data import UnreadableImageError, build_train_loader, register_coco
from tests.data.coco_sets import content, write

MIXED = ((32, 24), (24, 32), (40, 24), (24, 24), (24, 40))


def fake_records(count=23):
    """Records without files, of mixed aspect."""
    sizes = itertools.cycle(MIXED)
    return [
        {"id": i, "width": w, "height": h, "annotations": [{"category_id": i % 4}]}
        for i, (w, h) in zip(range(count), sizes, strict=False)
    ]


def randomised(record):
    """A mapper that shows which random numbers it was given."""
    numbers = random.random(), float(np.random.rand()), float(torch.rand(()))
    return {"id": record["id"], "width": record["width"], "numbers": numbers}


@pytest.fixture
def small(cfg):
    cfg.SEED = 5
    cfg.SOLVER.IMS_PER_BATCH = 4
    return cfg


def take(loader, count):
    return list(itertools.islice(loader, count))


def build(cfg, **options):
    return build_train_loader(cfg, mapper=randomised, dataset=fake_records(), **options)


@pytest.mark.parametrize("sampler", ["", "RepeatFactor", "RandomSubset"])
@pytest.mark.parametrize("grouping", [True, False])
def test_train_loader_resumed_equals_uninterrupted(small, sampler, grouping):
    small.DATALOADER.SAMPLER_TRAIN = f"{sampler}TrainingSampler"
    small.DATALOADER.REPEAT_THRESHOLD = 0.5
    small.DATALOADER.RANDOM_SUBSET_RATIO = 0.3
    small.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    whole = take(build(small), 30)
    assert all(len(batch) == 4 for batch in whole)
    assert (len({r["id"] for batch in whole for r in batch}) <= 6) == (sampler == "RandomSubset")
    for start in (0, 1, 7, 29):
        assert take(build(small, start_iter=start), 30 - start) == whole[start:]


def test_train_loader_random_subset_where_detectron2_has_its_key(small):
    small.DATALOADER.pop("RANDOM_SUBSET_RATIO", None)
    small.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    with pytest.raises(ValueError, match=r"'RandomSubset.*RANDOM_SUBSET_RATIO"):
        build(small)


def test_train_loader_order_of_detectron2(small):
    records = fake_records()
    sampled = (records[i] for i in TrainingSampler(len(records), seed=5))
    expected = take(AspectRatioGroupedDataset(sampled, 4), 20)
    assert [[r["id"] for r in b] for b in take(build(small), 20)] == [
        [r["id"] for r in b] for b in expected
    ]


@pytest.mark.parametrize(
    "sampler",
    [
        lambda: None,
        lambda: TrainingSampler(23, seed=1),
        lambda: RepeatFactorTrainingSampler(torch.linspace(1, 2, 23), seed=1),
        lambda: RandomSubsetTrainingSampler(23, 0.3, seed_shuffle=1, seed_subset=1),
    ],
)
def test_train_loader_takes_the_arguments_of_detectron2(sampler):
    """As a LazyConfig gives them; all but the sampler's seed is taken."""

    def build(start_iter):
        return build_train_loader(
            dataset=fake_records(),
            mapper=randomised,
            sampler=sampler(),
            total_batch_size=4,
            num_workers=0,
            collate_fn=tuple,
            seed=5,
            start_iter=start_iter,
        )

    whole = take(build(0), 12)
    assert all(type(batch) is tuple and len(batch) == 4 for batch in whole)
    assert take(build(5), 7) == whole[5:]


def test_train_loader_other_seed(small):
    first = take(build(small), 5)
    assert take(build(small, seed=6), 5) != first
    numbers = [r["numbers"] for batch in first for r in batch]
    assert len(set(numbers)) == len(numbers)


def test_train_loader_leaves_global_generators_alone(small):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(3).tolist()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    take(build(small), 3)
    small.DATALOADER.NUM_WORKERS = 1
    take(build(small), 3)
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == expected


def test_train_loader_ranks_share_the_stream(small, monkeypatch):
    separate = take(build(small), 20)
    by_id = {}
    for batch in separate:
        for record in batch:
            by_id.setdefault(record["id"], []).append(record["numbers"])
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "shared_random_seed", lambda: 0)
    shards = []
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        small.DATALOADER.ASPECT_RATIO_GROUPING = False
        loader = build(small)
        whole = take(loader, 20)
        assert all(len(batch) == 2 for batch in whole)
        assert take(build(small, start_iter=9), 11) == whole[9:]
        shards.append([r for batch in whole for r in batch])
    # 23 images: the first 23 draws of both ranks together are one epoch.
    drawn = [r["id"] for pair in zip(*shards, strict=True) for r in pair]
    assert sorted(drawn[:23]) == list(range(23))
    # A draw has the same augmentation however many ranks there are.
    first = [shards[0][0], shards[1][0]]
    assert all(r["numbers"] in by_id[r["id"]] for r in first)


def test_resume_before_the_first_batch(small):
    small.SEED = -1
    interrupted = build(small)
    whole = take(interrupted, 9)
    state = interrupted.state_dict()
    assert all(type(value) is int for value in state.values())
    again = build(small)
    again.resume(4, state)
    assert again.seed == interrupted.seed
    assert take(again, 5) == whole[4:]
    with pytest.raises(RuntimeError, match="before the first batch"):
        again.resume(0)


def test_resume_with_another_shape(small, caplog):
    state = build(small).state_dict()
    small.SOLVER.IMS_PER_BATCH = 2
    build(small).resume(3, state)
    assert "batch = 4, this one has 2" in caplog.text


def test_train_loader_nothing_runs_before_the_first_batch(small):
    calls = []
    loader = build_train_loader(small, mapper=calls.append, dataset=fake_records())
    batches = iter(loader)
    loader.resume(2)
    assert calls == []
    del batches


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("DATALOADER.SAMPLER_TRAIN", "NoSampler", "'NoSampler'.* expected TrainingSampler"),
        ("SOLVER.IMS_PER_BATCH", 0, "IMS_PER_BATCH is 0"),
    ],
)
def test_build_train_loader_bad_option(small, key, value, message):
    small.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build(small)


@pytest.fixture
def on_disk(small, tmp_path):
    """Twelve images on disk, as data set my_set."""
    paths = write(tmp_path / "set", content(num_images=12, sizes=MIXED))
    small.DATASETS.REGISTER_COCO = [["my_set", *paths]]
    small.DATASETS.TRAIN = ("my_set",)
    small.INPUT.MIN_SIZE_TRAIN, small.INPUT.MAX_SIZE_TRAIN = (24, 32, 40), 80
    register_coco(small)
    return small, Path(paths[1])


def test_build_train_loader_images_and_augmentation(on_disk):
    cfg, _ = on_disk

    def shown(batches):
        return [
            [(r["file_name"], r["image"], r["instances"].gt_boxes.tensor) for r in batch]
            for batch in batches
        ]

    whole = shown(take(build_train_loader(cfg), 8))
    cfg.DATALOADER.NUM_WORKERS = 2
    resumed = shown(take(build_train_loader(cfg, start_iter=3), 5))
    for a, b in zip(itertools.chain(*whole[3:]), itertools.chain(*resumed), strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])


def corrupt(path, how):
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:900])
    elif how == "html":
        path.write_text("<html>404</html>")
    elif how == "size":
        Image.fromarray(np.zeros((7, 9, 3), dtype=np.uint8)).save(path)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["missing", "empty", "cut", "html", "size"])
def test_build_train_loader_unreadable_image(on_disk, how, workers):
    cfg, root = on_disk
    corrupt(root / "0.png", how)
    cfg.DATALOADER.NUM_WORKERS = workers
    with pytest.raises(OSError, match=r"ata set 'my_set': .*0\.png"):
        take(build_train_loader(cfg), 12)


@pytest.mark.parametrize(("workers", "how"), [(0, "missing"), (2, "empty")])
def test_build_train_loader_skip_corrupt(on_disk, caplog, workers, how):
    cfg, root = on_disk
    cfg.DATALOADER.SKIP_CORRUPT = True
    cfg.DATALOADER.NUM_WORKERS = workers
    corrupt(root / "0.png", how)
    loader = build_train_loader(cfg)
    batches = take(loader, 12)
    assert all(len(batch) == 4 for batch in batches)
    names = [[r["file_name"] for r in batch] for batch in batches]
    assert not any(name.endswith("/0.png") for batch in names for name in batch)
    assert not any(key.startswith("_") for batch in batches for r in batch for key in r)
    ((message, times),) = loader.skipped.items()
    assert "0.png" in message and times >= 3
    loader.log_skipped()
    assert "1 images could not be read" in caplog.text
    # What replaces it is the same after a resume.
    resumed = take(build_train_loader(cfg, start_iter=6), 6)
    assert [[r["file_name"] for r in batch] for batch in resumed] == names[6:]


def test_build_train_loader_skip_corrupt_all(on_disk):
    cfg, root = on_disk
    cfg.DATALOADER.SKIP_CORRUPT = True
    for path in root.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UnreadableImageError, match="21 images in a row"):
        take(build_train_loader(cfg), 1)


def test_build_train_loader_mapper_returns_none(small):
    def picky(record):
        return randomised(record) if record["id"] != 3 else None

    loader = build_train_loader(small, mapper=picky, dataset=fake_records())
    assert all(r["id"] != 3 for batch in take(loader, 15) for r in batch)
    assert not loader.skipped


def test_build_train_loader_zero_area_boxes(small, tmp_path):
    data = content(num_images=3)
    data["annotations"][0]["bbox"] = [1, 1, 0, 5]  # image 1 keeps its other box
    data["annotations"][2]["bbox"] = [90, 1, 5, 5]  # image 2 loses both
    data["annotations"][3]["bbox"] = [1, 1, 5, 0]
    small.DATASETS.REGISTER_COCO = [["my_set", *write(tmp_path / "set", data)]]
    small.DATASETS.TRAIN, small.DATASETS.ZERO_AREA_BOXES = ("my_set",), "drop"
    register_coco(small)

    def boxes_of_each_image():
        batches = take(build_train_loader(small), 6)
        return {r["image_id"]: len(r["instances"]) for batch in batches for r in batch}

    assert boxes_of_each_image() == {1: 1, 3: 2}
    small.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert boxes_of_each_image() == {1: 1, 2: 0, 3: 2}
    # Detectron2's mapper leaves them out as well, so no box of zero area is ever learned.
    small.DATASETS.ZERO_AREA_BOXES = "error"
    assert boxes_of_each_image() == {1: 1, 2: 0, 3: 2}


class Items:
    """A custom data set: neither a list, nor of dictionaries."""

    def __len__(self):
        return 23

    def __getitem__(self, index):
        return index if 0 <= index < 23 else None


def test_build_train_loader_dataset_of_ones_own(small):
    small.DATALOADER.ASPECT_RATIO_GROUPING = False

    def mapper(item):
        return item, float(np.random.rand())

    def loader(start_iter=0):
        return build_train_loader(small, mapper=mapper, dataset=Items(), start_iter=start_iter)

    whole = take(loader(), 9)
    assert {item for batch in whole for item, _ in batch} == set(range(23))
    assert take(loader(start_iter=4), 5) == whole[4:]


def test_build_train_loader_dataset_without_length(small):
    with pytest.raises(TypeError, match=r"generator.*build_detection_train_loader"):
        build_train_loader(small, mapper=randomised, dataset=(r for r in fake_records()))


def test_build_train_loader_mapper_of_ones_own(small, tmp_path):
    """Of files that Detectron2 does not read."""
    small.DATALOADER.ASPECT_RATIO_GROUPING = False
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", np.full((24, 32), 40000 + i, dtype=np.uint16))
    records = [{"file_name": path, "image_id": 1} for path in tmp_path.glob("*.npy")]
    DatasetCatalog.register("deep", lambda: records)
    small.DATASETS.TRAIN = ("deep",)
    batches = take(build_train_loader(small, mapper=lambda r: np.load(r["file_name"]).max()), 3)
    assert {int(value) for b in batches for value in b} == {40000 + i for i in range(4)}


def test_build_train_loader_records_of_code(on_disk):
    cfg, root = on_disk
    good = {"bbox": [1.0, np.float32(2), 5, 6], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    records = [
        {"file_name": f"{root}/{i}.png", "height": h, "width": w, "annotations": [dict(good)]}
        for i, (w, h) in zip(range(4), MIXED, strict=False)
    ]
    DatasetCatalog.register("by_code", lambda: records)
    cfg.DATASETS.TRAIN = ("by_code",)
    take(build_train_loader(cfg), 1)
    records[2]["annotations"][0]["bbox"] = [1, 2, 3]
    with pytest.raises(ValueError, match=r"'by_code'.*\"bbox\" of 3 .*record 2 .*2\.png"):
        build_train_loader(cfg)


@pytest.mark.parametrize("category", [2, -1])
def test_build_train_loader_classes_of_a_dataset_given(on_disk, category):
    """Neither the catalog nor a file has these records."""
    cfg, root = on_disk
    box = {"bbox": [1, 2, 5, 6], "bbox_mode": BoxMode.XYWH_ABS, "category_id": category}
    sized = {"file_name": f"{root}/0.png", "height": 24, "width": 32}
    with pytest.raises(ValueError, match=r'"category_id" out of \[0, 2\)'):
        build_train_loader(cfg, dataset=[{**sized, "annotations": [box]}])
    with pytest.raises(ValueError, match='"annotations"'):
        build_train_loader(cfg, dataset=[sized])


@pytest.mark.parametrize(("category", "fits"), [(0, True), (1, True), (2, False), (-1, False)])
def test_build_train_loader_classes_of_a_mapper(small, category, fits):
    def mapper(record):
        instances = Instances((24, 32), gt_classes=torch.tensor([0, category]))
        return {"file_name": "a.png", "instances": instances}

    batches = iter(build_train_loader(small, mapper=mapper, dataset=fake_records()))
    if fits:
        assert len(next(batches)) == 4
        return
    with pytest.raises(ValueError, match=rf"a\.png .*{category}.*\[0, 2\)"):
        next(batches)
