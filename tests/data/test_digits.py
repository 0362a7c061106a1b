"""The embedded data set: what is drawn, and how it gets onto the disk."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from sklearn.datasets import load_digits

from ssim_kd.config import add_distill_config
from ssim_kd.data import ensure_digits, register_digits
from ssim_kd.data.digits import splits_from_config
from ssim_kd.data.glyphs import GLYPHS_PER_SPLIT, SPLITS, load_glyphs
from ssim_kd.data.make import make_split
from ssim_kd.data.render import MAX_OCCLUSION, Scene, render_image
from ssim_kd.data.streams import Stream

SCENE = Scene(
    seed=3, image_size=64, digits_per_image=(2, 5), digit_size=(14.0, 30.0), difficulty=1.0
)

GOLDEN_UNITS = [0.612145161880767, 0.5633667610075984, 0.7938437756342841]
GOLDEN_DISCRETE = [[1, 3, 0, 2, 5, 4], 8]
# (label, glyph, box, area)
GOLDEN_DIGITS = [(1, 346, (4, 26, 14, 21), 145), (1, 1386, (36, 25, 9, 16), 75)]
GOLDEN_MEANS = [
    [103.4, 101.6, 119.5, 139.1],
    [124.8, 121.3, 114.0, 116.4],
    [124.6, 129.2, 124.9, 99.5],
    [130.5, 100.8, 105.2, 106.5],
]


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    add_distill_config(cfg)
    digits = cfg.DATASETS.DIGITS
    digits.ROOT, digits.IMAGE_SIZE, digits.DIGIT_SIZE = str(tmp_path), 64, (14, 30)
    digits.NUM_IMAGES = (6, 3, 2)
    yield cfg
    for split in SPLITS:
        DatasetCatalog.pop(f"digits_{split}", None)
        MetadataCatalog.pop(f"digits_{split}", None)


def test_stream_is_the_same_for_ever():
    stream = Stream(3, 0, 7)
    numbers = [stream.unit() for _ in range(3)]
    np.testing.assert_array_equal(numbers, GOLDEN_UNITS)
    assert [Stream(5).permutation(6), Stream(5).integer(1, 9)] == GOLDEN_DISCRETE


def test_stream_distributions():
    stream = Stream(1)
    bells, units = stream.bells(200, 200), stream.uniforms(200, 200)
    assert abs(bells.mean()) < 0.02 and abs(bells.std() - 1) < 0.02
    assert units.min() >= 0 and units.max() < 1 and abs(units.mean() - 0.5) < 0.01
    assert {Stream(i).integer(2, 4) for i in range(60)} == {2, 3, 4}
    assert all(14 <= Stream(i).log_uniform(14, 96) < 96 for i in range(60))


def test_no_glyph_crosses_splits_and_classes_are_in_proportion():
    sets = [load_glyphs(split) for split in SPLITS]
    assert tuple(len(s) for s in sets) == GLYPHS_PER_SPLIT
    index = np.concatenate([s.index for s in sets])
    assert len(np.unique(index)) == len(index) == 1797
    pixels = load_digits().images.reshape(1797, -1)
    owner = {}
    for number, glyphs in enumerate(sets):
        for i in glyphs.index:  # nor does a copy of a glyph
            assert owner.setdefault(pixels[i].tobytes(), number) == number
    share = [np.bincount(s.label, minlength=10) / len(s) for s in sets]
    assert np.ptp(share, axis=0).max() < 0.01


@pytest.mark.parametrize("split", SPLITS)
def test_images_show_glyphs_of_their_split_alone(split):
    allowed = set(load_glyphs(split).index.tolist())
    used = {d.glyph for i in range(20) for d in render_image(SCENE, split, i)[1]}
    assert used and used <= allowed


def test_unknown_split():
    with pytest.raises(ValueError, match=r"'tset'.*train, val, test"):
        load_glyphs("tset")


# Boxes and labels are integers from raw random bits and double precision: exact on every version.
# Pixels may differ by rounding, so they are compared by coarse means.
def test_golden_scene():
    image, digits = render_image(SCENE, "train", 0)
    assert [(d.label, d.glyph, d.box, d.area) for d in digits] == GOLDEN_DIGITS
    means = image.reshape(4, 16, 4, 16, 3).mean(axis=(1, 3, 4))
    np.testing.assert_allclose(means, GOLDEN_MEANS, atol=0.6)


def test_images_depend_on_their_key_alone():
    first = render_image(SCENE, "val", 4)[0]
    render_image(SCENE, "val", 5)
    np.testing.assert_array_equal(render_image(SCENE, "val", 4)[0], first)
    for other in (
        render_image(SCENE, "val", 5),
        render_image(SCENE, "test", 4),
        render_image(replace(SCENE, seed=4), "val", 4),
    ):
        assert (other[0] != first).any()


@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0, 2.0])
def test_boxes_sizes_counts_and_occlusion(difficulty):
    scene = replace(SCENE, difficulty=difficulty, image_size=96, digits_per_image=(2, 8))
    for index in range(25):
        image, digits = render_image(scene, "train", index)
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8
        assert 1 <= len(digits) <= 8
        for digit in digits:
            x, y, width, height = digit.box
            assert x >= 0 and y >= 0 and x + width <= 96 and y + height <= 96
            assert digit.mask.shape == (height, width) and digit.mask.sum() == digit.area
            edges = digit.mask[0], digit.mask[-1], digit.mask[:, 0], digit.mask[:, -1]
            assert all(edge.any() for edge in edges)  # tight
            assert 0 <= digit.hidden <= MAX_OCCLUSION * difficulty + 1e-9
            assert 7 <= height <= 60


def test_clean_images_show_exactly_the_masks():
    scene = replace(SCENE, difficulty=0.0)
    for index in range(10):
        image, digits = render_image(scene, "train", index)
        ground = image[0, 0] if not any(d.box[:2] == (0, 0) for d in digits) else image[-1, -1]
        strong = np.abs(image.astype(int) - ground).max(axis=2) > 0
        covered = np.zeros_like(strong)
        for digit in digits:
            x, y, width, height = digit.box
            window = strong[y : y + height, x : x + width]
            assert window[digit.mask].mean() > 0.99
            covered[y : y + height, x : x + width] = True
        # What is drawn outside the boxes is the soft edge alone.
        assert not strong[~covered].any()


def test_sizes_are_log_uniform():
    scene = replace(SCENE, image_size=256, digit_size=(14, 96), difficulty=0.0)
    heights = [d.box[3] for i in range(60) for d in render_image(scene, "train", i)[1]]
    middle = np.median(heights)
    assert 25 < middle < 45 and min(heights) >= 12 and max(heights) <= 100


def test_registered_lazily_and_loaded(cfg, tmp_path):
    register_digits(cfg)
    assert not list(tmp_path.iterdir())
    dicts = DatasetCatalog.get("digits_train")
    assert len(dicts) == 6 and all(Path(d["file_name"]).is_file() for d in dicts)
    assert {a["category_id"] for d in dicts for a in d["annotations"]} <= set(range(10))
    meta = MetadataCatalog.get("digits_train")
    assert meta.evaluator_type == "coco" and meta.thing_classes == [str(i) for i in range(10)]
    content = json.loads(Path(meta.json_file).read_text())
    assert [c["id"] for c in content["categories"]] == list(range(1, 11))
    scene = splits_from_config(cfg)[0].scene
    picture = np.asarray(Image.open(dicts[2]["file_name"]))
    np.testing.assert_array_equal(picture, render_image(scene, "train", 2)[0])


def test_more_images_keep_the_first(cfg):
    register_digits(cfg)
    few = DatasetCatalog.get("digits_val")
    cfg.DATASETS.DIGITS.NUM_IMAGES = (6, 5, 2)
    register_digits(cfg)
    more = DatasetCatalog.get("digits_val")
    assert len(few) == 3 and len(more) == 5
    for a, b in zip(few, more, strict=False):
        assert a["annotations"] == b["annotations"]
        assert Path(a["file_name"]).read_bytes() == Path(b["file_name"]).read_bytes()


def test_every_parameter_has_its_own_folder(cfg):
    folders = {splits_from_config(cfg)[0].folder}
    for key, value in (
        ("SEED", 1),
        ("IMAGE_SIZE", 72),
        ("DIGITS_PER_IMAGE", (1, 8)),
        ("DIGIT_SIZE", (15, 30)),
        ("DIFFICULTY", 0.5),
        ("NUM_IMAGES", (7, 3, 2)),
    ):
        cfg.DATASETS.DIGITS[key] = value
        folders.add(splits_from_config(cfg)[0].folder)
    assert len(folders) == 7


def test_ensure_makes_what_an_evaluator_reads(cfg):
    from detectron2.evaluation import COCOEvaluator

    register_digits(cfg)
    ensure_digits(["digits_test", "coco_2017_val"])  # other names are ignored
    COCOEvaluator("digits_test", tasks=("bbox",), distributed=False, use_fast_impl=False)


def test_name_taken_by_another_package(cfg):
    for split in SPLITS:
        DatasetCatalog.pop(f"digits_{split}", None)
    import ssim_kd.data.digits as module

    module._REGISTERED.clear()
    DatasetCatalog.register("digits_val", list)
    with pytest.raises(ValueError, match="'digits_val' is taken"):
        register_digits(cfg)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SEED", -1),
        ("IMAGE_SIZE", 8),
        ("NUM_IMAGES", (1, 1)),
        ("NUM_IMAGES", (0, 1, 1)),
        ("DIGITS_PER_IMAGE", (0, 3)),
        ("DIGITS_PER_IMAGE", (4, 3)),
        ("DIGITS_PER_IMAGE", (4,)),
        ("DIGIT_SIZE", (4, 30)),
        ("DIGIT_SIZE", (14, 65)),
        ("DIGIT_SIZE", (40, 60)),
        ("DIFFICULTY", -0.1),
        ("DIFFICULTY", float("nan")),
        ("ROOT", ""),
    ],
)
def test_bad_parameters_are_named(cfg, key, value):
    cfg.DATASETS.DIGITS[key] = value
    with pytest.raises(ValueError, match=rf"DATASETS\.DIGITS\.{key} is .*expected"):
        register_digits(cfg)


def _make(folder: str, queue) -> None:
    make_split(SCENE, "val", 15, Path(folder), "0123456789")
    queue.put(sorted(path.name for path in Path(folder).iterdir()))


def test_several_processes_make_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    folder = tmp_path / "set" / "val_15"
    workers = [context.Process(target=_make, args=(str(folder), queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    listings = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert listings[0] == listings[1] == listings[2] and len(listings[0]) == 16
    assert sorted(p.name for p in folder.parent.iterdir()) == [".val_15.lock", "val_15"]


def test_killed_while_drawing(tmp_path):
    folder = tmp_path / "set" / "val_40000"
    code = (
        "from pathlib import Path; from ssim_kd.data.make import make_split\n"
        "from ssim_kd.data.render import Scene\n"
        f"make_split(Scene(3, 64, (2, 5), (14.0, 30.0), 1.0), 'val', 40000, "
        f"Path({str(folder)!r}), '0123456789')"
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stderr=subprocess.DEVNULL, env=dict(os.environ)
    )
    unfinished = folder.parent / ".val_40000.unfinished"
    deadline = time.monotonic() + 60
    while not (unfinished / "000003.png").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not folder.exists() and unfinished.exists()
    # The lock died with its holder, and what it left is cleared away.
    make_split(SCENE, "val", 2, folder, "0123456789")
    assert not unfinished.exists()
    assert sorted(p.name for p in folder.iterdir()) == [
        "000000.png",
        "000001.png",
        "annotations.json",
    ]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        make_split(SCENE, "val", 1, tmp_path / "file" / "val_1", "0123456789")
