"""Config files: equal keys of one mapping are refused, in a file and in its bases."""

from __future__ import annotations

import glob
import io
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from detectron2 import model_zoo
from detectron2.config import get_cfg

from ssim_kd import yaml_files
from ssim_kd.config_files import find_config_file, merge_file
from ssim_kd.yaml_files import near_shipped, read_with_bases

ZOO = os.path.join(os.path.dirname(model_zoo.__file__), "configs")


def merged(folder: Path, **files: str):
    """Write files and merge the one named config."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    cfg = get_cfg()
    merge_file(cfg, str(folder / "config.yaml"))
    return cfg


TWICE = {
    "block": (
        "MODEL:\n  FPN: {NORM: GN}\nSEED: 1\nMODEL: {MASK_ON: True}\n",
        "MODEL",
        1,
        4,
    ),
    "nested": ("MODEL:\n  FPN:\n    NORM: GN\n    NORM: BN\n", "MODEL.FPN.NORM", 3, 4),
    "one line": ("SOLVER: {BASE_LR: 0.1, MAX_ITER: 5, BASE_LR: 0.2}\n", "SOLVER.BASE_LR", 1, 1),
    "equal values": ("SEED: 3\nSEED: 3\n", "SEED", 1, 2),
    "quoted": ("SEED: 3\n'SEED': 4\n", "SEED", 1, 2),
    "in a list": ("DATASETS:\n  TRAIN: [{a: 1, a: 2}]\n", "DATASETS.TRAIN[0].a", 2, 2),
    "base": ("_BASE_: a.yaml\nSEED: 1\n_BASE_: b.yaml\n", "_BASE_", 1, 3),
}


@pytest.mark.parametrize("kind", TWICE)
def test_merge_file_equal_keys(kind, tmp_path) -> None:
    text, key, first, second = TWICE[kind]
    with pytest.raises(ValueError) as caught:
        merged(tmp_path, config=text)
    message = str(caught.value)
    assert str(tmp_path / "config.yaml") in message and f"key {key} twice" in message
    assert f"lines {first} and {second}" in message


@pytest.mark.parametrize("bases", ["base.yaml", "[good.yaml, base.yaml]"])
def test_merge_file_equal_keys_in_a_base(bases, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"_BASE_ \S*base\.yaml .*SOLVER twice, in lines 1 and 2"):
        merged(
            tmp_path,
            config=f"_BASE_: {bases}\nSEED: 1\n",
            good="SEED: 5\n",
            base="SOLVER: {MAX_ITER: 5}\nSOLVER: {BASE_LR: 0.5}\n",
        )


def test_merge_file_override_of_a_base(tmp_path) -> None:
    cfg = merged(
        tmp_path,
        config="_BASE_: base.yaml\nSOLVER: {MAX_ITER: 7}\n",
        base="SOLVER: {MAX_ITER: 5, BASE_LR: 0.5}\n",
    )
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (7, 0.5)


def test_merge_file_anchors_and_merge_keys(tmp_path) -> None:
    cfg = merged(
        tmp_path,
        config="SOLVER: {STEPS: &b [1, 2]}\nMODEL:\n  RPN: &a {CONV_DIMS: *b, LOSS_WEIGHT: 2.0}\n"
        "TEST:\n  AUG: {<<: {FLIP: False}, <<: {MAX_SIZE: 7}}\n",
    )
    assert tuple(cfg.SOLVER.STEPS) == tuple(cfg.MODEL.RPN.CONV_DIMS) == (1, 2)
    assert (cfg.TEST.AUG.FLIP, cfg.TEST.AUG.MAX_SIZE) == (False, 7)


@pytest.mark.parametrize("root", [ZOO, str(Path(__file__).resolve().parents[1] / "configs")])
def test_merge_file_shipped_configs_have_no_equal_keys(root) -> None:
    files = glob.glob(os.path.join(root, "**", "*.yaml"), recursive=True)
    assert files
    for file in files:
        read_with_bases(file)


CODE = "!!python/object/apply:exec [\"open('ran', 'w')\"]"
BOMB = "A: &a0 [1, 1]\n" + "".join(f"A{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
NO_MAKER = "could not determine a constructor"
REFUSED = {
    "code": (f"SEED: {CODE}\n", NO_MAKER),
    "code in a base": ("_BASE_: bad.yaml\n", NO_MAKER),
    "code in a base by a merge key": ("<<: {_BASE_: bad.yaml}\n", NO_MAKER),
    "equal keys in a base by a merge key": ("<<: {_BASE_: twice.yaml}\n", "key SEED twice"),
    "aliases of aliases": (BOMB, r"config\.yaml holds .* values by aliases"),
    "alias of itself": ("A: &a [*a]\n", r"config\.yaml holds an alias of what it is in"),
    "nesting": (f"A: {'[' * 9000}", r"config\.yaml is nested too deeply"),
    "digits": (f"SEED: {'9' * 5000}\n", r"config\.yaml: .*digits"),
    "bytes": ("SEED: \udcff\n", r"config\.yaml: .*decode"),
    "value for section": ("_BASE_: good.yaml\nSEED: {A: 1}\n", r"config\.yaml: SEED is 1 in its"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_merge_file_refused(kind, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, match = REFUSED[kind]
    (tmp_path / "config.yaml").write_bytes(text.encode(errors="surrogateescape"))
    bases = {"bad": f"SEED: {CODE}\n", "twice": "SEED: 1\nSEED: 2\n", "good": "SEED: 1\n"}
    for name, content in bases.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    cfg = get_cfg()
    before = cfg.dump()
    with pytest.raises((ValueError, yaml.YAMLError), match=match):
        merge_file(cfg, str(tmp_path / "config.yaml"))
    assert cfg.dump() == before and not (tmp_path / "ran").exists()


def test_merge_file_reads_each_file_once(tmp_path, monkeypatch) -> None:
    """One that is swapped after it was checked is not what is merged."""
    opened = []

    def swapped(path: str, *args: Any) -> Any:
        opened.append(os.path.basename(path))
        content = io.StringIO(Path(path).read_text())
        Path(path).write_text(f"SEED: {CODE}\n")
        return content

    for name, text in (("config", "_BASE_: base.yaml\nSEED: 7\n"), ("base", "VIS_PERIOD: 5\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(yaml_files.PathManager, "open", swapped)
    cfg = get_cfg()
    merge_file(cfg, str(tmp_path / "config.yaml"))
    assert (cfg.SEED, cfg.VIS_PERIOD, opened) == (7, 5, ["config.yaml", "base.yaml"])


def test_merge_file_base_by_its_name_in_the_zoo(tmp_path, monkeypatch) -> None:
    """A file next to the config comes first; one in the working directory does not count."""
    monkeypatch.chdir(tmp_path)
    name = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    (tmp_path / "COCO-Detection").mkdir()
    (tmp_path / name).write_text("SEED: 9\n")
    (tmp_path / "run").mkdir()
    cfg = merged(tmp_path / "run", config=f"_BASE_: {name}\n")
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.SEED) == ("RetinaNet", -1)
    assert merged(tmp_path, config=f"_BASE_: {name}\n").SEED == 9
    with pytest.raises(ValueError, match=r"nowhere\.yaml .*cannot be opened"):
        merged(tmp_path, config="_BASE_: nowhere.yaml\n")


def test_merge_file_alias_in_a_base(tmp_path) -> None:
    """An override of one of two keys that share a value leaves the other."""
    cfg = merged(
        tmp_path,
        config="_BASE_: base.yaml\nMODEL: {ROI_BOX_HEAD: {NUM_CONV: 3}}\n",
        base="MODEL: {ROI_BOX_HEAD: &a {NUM_CONV: 2}, ROI_MASK_HEAD: *a}\n",
    )
    assert (cfg.MODEL.ROI_BOX_HEAD.NUM_CONV, cfg.MODEL.ROI_MASK_HEAD.NUM_CONV) == (3, 2)


def test_merge_file_of_an_earlier_version(tmp_path) -> None:
    cfg = merged(tmp_path, config="VERSION: 1\nMODEL: {WEIGHT: a.pkl}\n")
    assert (cfg.MODEL.WEIGHTS, cfg.VERSION) == ("a.pkl", 2)


def test_config_of_a_method_by_its_name() -> None:
    name = "PKD/pkd_retinanet_R_50_FPN_1x.yaml"
    assert find_config_file(name).endswith(name.replace("/", "/configs/"))
    assert name in near_shipped("PKD/pkd_retinanet_R_50_FPN_1.yaml")
