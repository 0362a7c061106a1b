"""Config files: equal keys of one mapping are refused, in a file and in its bases."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import pytest
from detectron2 import model_zoo
from detectron2.config import get_cfg

from ssim_kd.config_files import _check_files, merge_file

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
        _check_files(file)
