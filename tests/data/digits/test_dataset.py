"""The digits on disk: registered lazily, made whole or not at all."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from PIL import Image

import ssim_kd.data.digits.dataset as module
from ssim_kd.data import ensure_digits, register_digits
from ssim_kd.data.digits.dataset import make_split
from ssim_kd.data.digits.renderer import render_image
from ssim_kd.data.digits.scene import SPLITS, DigitsSplit, Scene, splits_from_config
from tests.engine.runs import wait_until

ROOT = Path(__file__).resolve().parents[3]
SCENE = Scene(
    seed=3, image_size=64, digits_per_image=(2, 5), digit_size=(14.0, 30.0), difficulty=1.0
)


def split_in(root, num_images: int) -> DigitsSplit:
    return DigitsSplit(SCENE, "val", num_images, Path(root))


def test_register_digits_is_lazy(cfg, tmp_path):
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


def test_register_digits_more_images_keep_the_first(cfg):
    register_digits(cfg)
    few = DatasetCatalog.get("digits_val")
    cfg.DATASETS.DIGITS.NUM_IMAGES = (6, 5, 2)
    register_digits(cfg)
    more = DatasetCatalog.get("digits_val")
    assert len(few) == 3 and len(more) == 5
    for a, b in zip(few, more, strict=False):
        assert a["annotations"] == b["annotations"]
        assert Path(a["file_name"]).read_bytes() == Path(b["file_name"]).read_bytes()


def test_ensure_digits_makes_what_an_evaluator_reads(cfg):
    register_digits(cfg)
    ensure_digits(["digits_test", "coco_2017_val"])  # other names are ignored
    COCOEvaluator("digits_test", tasks=("bbox",), distributed=False, use_fast_impl=False)


def test_register_digits_name_taken(cfg):
    for split in SPLITS:
        DatasetCatalog.pop(f"digits_{split}", None)
    module._REGISTERED.clear()
    DatasetCatalog.register("digits_val", list)
    with pytest.raises(ValueError, match="'digits_val' is taken"):
        register_digits(cfg)


@pytest.mark.parametrize("package", ["sklearn", "scipy", "tqdm"])
def test_make_split_extra_not_installed(tmp_path, monkeypatch, package):
    for name in list(sys.modules):
        if name.split(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
        elif name.startswith("ssim_kd.data.digits.") and name.endswith(("renderer", "glyphs")):
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install 'ssim_kd\[digits\]'") as caught:
        make_split(split_in(tmp_path, 1))
    assert caught.value.name == package


def _make(root: str, queue) -> None:
    make_split(split_in(root, 15))
    queue.put(sorted(path.name for path in split_in(root, 15).folder.iterdir()))


def test_make_split_several_processes(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    folder = split_in(tmp_path, 15).folder
    workers = [context.Process(target=_make, args=(str(tmp_path), queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    listings = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert listings[0] == listings[1] == listings[2] and len(listings[0]) == 16
    assert sorted(p.name for p in folder.parent.iterdir()) == [".val_15.lock", "val_15"]


def test_make_split_after_a_kill(tmp_path):
    split = split_in(tmp_path, 40000)
    code = (
        "from tests.data.digits.test_dataset import split_in\n"
        "from ssim_kd.data.digits.dataset import make_split\n"
        f"make_split(split_in({str(tmp_path)!r}, 40000))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    unfinished = split.folder.parent / ".val_40000.unfinished"
    wait_until((unfinished / "000003.png").exists, 300)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not split.folder.exists() and unfinished.exists()
    # The lock died with its holder, and what it left is cleared away.
    (unfinished / "rest").write_text("")
    os.rename(unfinished, unfinished.with_name(".val_2.unfinished"))
    split = replace(split, num_images=2)
    make_split(split)
    assert sorted(p.name for p in split.folder.iterdir()) == [
        "000000.png",
        "000001.png",
        "annotations.json",
    ]
    assert not unfinished.with_name(".val_2.unfinished").exists()


def test_make_split_folder_not_writable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        make_split(split_in(tmp_path / "file", 1))
