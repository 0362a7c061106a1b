"""Configs of teachers with keys beside Detectron2's: of its main branch, of the user's code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from torch import nn

from ssim_kd import config
from ssim_kd.config import share_keys, write_stock_config
from ssim_kd.modeling.teacher_config import source_of, teacher_config
from tests.helpers import build, distilled_config, full_config, save_weights, stock_config


class Wide(Backbone):
    """A backbone with a config key of its own, as ports of Swin or VoVNet have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 7, stride=16, padding=3)
        self.width = width

    def forward(self, x):
        return {"stage4": self.conv(x).relu()}

    def output_shape(self):
        return {"stage4": ShapeSpec(channels=self.width, stride=16)}


if "build_wide_of_tests" not in BACKBONE_REGISTRY:

    @BACKBONE_REGISTRY.register()
    def build_wide_of_tests(cfg, input_shape):
        return Wide(cfg.MODEL.WIDE.WIDTH)


def add_wide(cfg: CfgNode) -> None:
    cfg.MODEL.WIDE = CfgNode({"WIDTH": 8})


WIDE = (
    *("MODEL.BACKBONE.NAME", "build_wide_of_tests", "MODEL.RPN.IN_FEATURES", ["stage4"]),
    *("MODEL.ROI_HEADS.IN_FEATURES", ["stage4"], "MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32, 64]]),
)


@pytest.fixture(autouse=True)
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """What other tests have shared is not shared here."""
    found: list = []
    monkeypatch.setattr(config, "_shared", found)
    yield found


@pytest.fixture(scope="module")
def full_yaml(tmp_path_factory) -> Path:
    """The whole config of a wide teacher of width 12, as a training writes it; its weights."""
    folder = tmp_path_factory.mktemp("wide")
    cfg = stock_config("faster")
    add_wide(cfg)
    cfg.merge_from_list([*WIDE, "MODEL.WIDE.WIDTH", 12])
    (folder / "config.yaml").write_text(cfg.dump())
    save_weights(cfg, folder / "model_final.pth")
    return folder / "config.yaml"


def student(teacher: Path, *opts: object) -> CfgNode:
    """A wide student of width 16 whose teacher is of a config file."""
    cfg = distilled_config("faster", "faster", str(teacher.parent / "model_final.pth"))
    add_wide(cfg)
    cfg.merge_from_list([*WIDE, "MODEL.WIDE.WIDTH", 16])
    cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE = str(teacher)
    cfg.MODEL.DISTILL.TEACHER.OPTS = list(opts)
    return cfg


def test_teacher_config_of_a_backbone_with_keys(full_yaml, caplog) -> None:
    """Its value is its file's, and the student's its own; nothing has to be registered."""
    model = build(student(full_yaml))
    assert model.student.backbone.width == 16
    assert model.teacher.model.backbone.width == 12
    assert "MODEL.WIDE" not in caplog.text


@pytest.fixture
def partial_yaml(full_yaml, tmp_path) -> Path:
    """A file that leaves the backbone's own key out."""
    content = yaml.safe_load(full_yaml.read_text())
    del content["MODEL"]["WIDE"]
    path = tmp_path / "partial.yaml"
    path.write_text(yaml.safe_dump(content))
    (tmp_path / "model_final.pth").symlink_to(full_yaml.parent / "model_final.pth")
    return path


def test_teacher_config_default_of_the_users_key(partial_yaml, caplog) -> None:
    share_keys(add_wide)
    assert teacher_config(student(partial_yaml)).MODEL.WIDE.WIDTH == 8
    assert "MODEL.WIDE" not in caplog.text


def test_teacher_config_users_key_that_nothing_sets(partial_yaml, caplog) -> None:
    assert teacher_config(student(partial_yaml)).MODEL.WIDE.WIDTH == 16
    assert "MODEL.WIDE" in caplog.text and "partial.yaml" in caplog.text
    found = teacher_config(student(partial_yaml, "MODEL.WIDE.WIDTH", 12))
    assert found.MODEL.WIDE.WIDTH == 12


def test_teacher_config_keys_that_nothing_reads(full_yaml, tmp_path, caplog) -> None:
    """As a config.yaml of Detectron2's main branch, or of another project, has them."""
    content = yaml.safe_load(full_yaml.read_text())
    content["FUTURE_PRECISION"] = ""
    content["SOLVER"]["FUTURE_DECAYS"] = 3
    content["SEMISUPNET"] = {"EMA_KEEP_RATE": 0.99}
    path = tmp_path / "main.yaml"
    path.write_text(yaml.safe_dump(content))
    cfg = teacher_config(student(path, "SOLVER.BASE_LR", 0.5))
    assert cfg.SOLVER.BASE_LR == 0.5
    for key in ("FUTURE_PRECISION", "SOLVER.FUTURE_DECAYS", "SEMISUPNET.EMA_KEEP_RATE"):
        assert key in caplog.text
    with pytest.raises(ValueError, match=r"SOLVER\.BASE_LRR"):
        teacher_config(student(path, "SOLVER.BASE_LRR", 0.5))


def test_write_stock_config_keeps_the_users_keys(full_yaml, tmp_path) -> None:
    cfg = student(full_yaml)
    path = tmp_path / "student.yaml"
    write_stock_config(cfg, str(path))
    assert "MODEL.WIDE" in path.read_text().splitlines()[0]
    stock = get_cfg()
    add_wide(stock)
    stock.merge_from_file(str(path))
    assert build_model(stock).backbone.width == 16
    # Without the key nothing is built that is not what was trained.
    with pytest.raises(KeyError, match=r"MODEL\.WIDE"):
        get_cfg().merge_from_file(str(path))
    for key in ("DISTILL", "REGISTER_COCO", "WEIGHTS_PARTIAL", "TIMM", "GRACE_PERIOD"):
        assert key not in path.read_text()


def test_share_keys_once(shared) -> None:
    share_keys(add_wide)
    share_keys(add_wide)
    assert shared == [add_wide]
    assert "WIDE" not in full_config().MODEL


def test_teacher_of_a_lazy_training_is_refused_with_the_remedy(tmp_path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lazy = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
    LazyConfig.save(lazy, str(folder / "config.yaml"))
    assert (folder / "config.yaml").is_file()
    (folder / "model_final.pth").touch()
    with pytest.raises(ValueError, match=r"LazyConfig.*\.py .*model_final\.pth") as caught:
        source_of(str(folder))
    assert "MODEL.DISTILL.TEACHER.WEIGHTS" in str(caught.value)
