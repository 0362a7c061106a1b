"""Teachers' configs with other keys than Detectron2's: of its main branch, of the user's code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler
from torch import nn

from ssim_kd import config
from ssim_kd.command_line import argument_parser
from ssim_kd.config import share_keys, write_stock_config
from ssim_kd.config_files import merge_file
from ssim_kd.engine import load_config
from ssim_kd.modeling import FrozenTeacher, find_teacher, teacher_name, teacher_source
from ssim_kd.modeling.teacher_files import TeacherNotFoundError
from tests.helpers import (
    build,
    distilled_config,
    full_config,
    make_batch,
    save_weights,
    stock_config,
    train_losses,
)


class Wide(Backbone):
    """A backbone with a custom config key, as ports of Swin or VoVNet have."""

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
    cfg.MODEL.DISTILL.TEACHER.NAME = str(teacher)
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
    assert teacher_source(student(partial_yaml)).cfg.MODEL.WIDE.WIDTH == 8
    assert "MODEL.WIDE" not in caplog.text


def test_teacher_config_users_key_that_nothing_sets(partial_yaml, caplog) -> None:
    assert teacher_source(student(partial_yaml)).cfg.MODEL.WIDE.WIDTH == 16
    assert "MODEL.WIDE" in caplog.text and "partial.yaml" in caplog.text
    found = teacher_source(student(partial_yaml, "MODEL.WIDE.WIDTH", 12)).cfg
    assert found.MODEL.WIDE.WIDTH == 12


def test_teacher_config_keys_that_nothing_reads(full_yaml, tmp_path, caplog) -> None:
    """As a config.yaml of Detectron2's main branch, or of another project, has them."""
    content = yaml.safe_load(full_yaml.read_text())
    content["FUTURE_PRECISION"] = ""
    content["SOLVER"]["FUTURE_DECAYS"] = 3
    content["SEMISUPNET"] = {"EMA_KEEP_RATE": 0.99}
    path = tmp_path / "main.yaml"
    path.write_text(yaml.safe_dump(content))
    cfg = teacher_source(student(path, "SOLVER.BASE_LR", 0.5)).cfg
    assert cfg.SOLVER.BASE_LR == 0.5
    for key in ("FUTURE_PRECISION", "SOLVER.FUTURE_DECAYS", "SEMISUPNET.EMA_KEEP_RATE"):
        assert key in caplog.text
    with pytest.raises(ValueError, match=r"SOLVER\.BASE_LRR"):
        teacher_source(student(path, "SOLVER.BASE_LRR", 0.5))


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


class TestFormerName:
    """TEACHER.NAME was called TEACHER.CONFIG_FILE."""

    def test_a_file_of_then_over_a_base_of_now(self, tmp_path) -> None:
        (tmp_path / "base.yaml").write_text("MODEL: {DISTILL: {TEACHER: {NAME: a}}}")
        path = tmp_path / "own.yaml"
        path.write_text("{_BASE_: base.yaml, MODEL: {DISTILL: {TEACHER: {CONFIG_FILE: b}}}}")
        cfg = full_config()
        merge_file(cfg, str(path))
        assert teacher_name(cfg) == "b"

    def test_another_trainer(self) -> None:
        cfg = full_config()
        cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE = "b"
        assert teacher_name(cfg) == "b"
        cfg.MODEL.DISTILL.TEACHER.NAME = "a"
        with pytest.raises(ValueError, match=r"NAME is 'a'.*CONFIG_FILE.*'b'"):
            teacher_name(cfg)

    @pytest.mark.parametrize(
        "args", [["--teacher", "b"], ["TEACHER.NAME"], ["TEACHER.CONFIG_FILE"]]
    )
    def test_command_line(self, args, full_yaml) -> None:
        if len(args) == 1:
            args = [f"MODEL.DISTILL.{args[0]}", "b"]
        path = full_yaml.parent / "student.yaml"
        distill = "STUDENT_META_ARCHITECTURE: RetinaNet, TEACHER: {CONFIG_FILE: a}"
        path.write_text(f"MODEL: {{META_ARCHITECTURE: DistilledDetector, DISTILL: {{{distill}}}}}")
        cfg = load_config(argument_parser().parse_args(["--config-file", str(path), *args]))
        assert (cfg.MODEL.DISTILL.TEACHER.NAME, cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE) == ("b", "")


class TestWeightsOfARun:
    @pytest.mark.parametrize(
        ("files", "taken"),
        [
            (("model_final.pth", "model_best.pth"), "model_best.pth"),
            (("model_final.pth", "model_0000009.pth"), "model_final.pth"),
        ],
    )
    def test_the_best_known_are_taken(self, files, taken, tmp_path) -> None:
        for file in (*files, "config.yaml"):
            (tmp_path / file).touch()
        assert find_teacher(str(tmp_path))[1] == str(tmp_path / taken)
        final = str(tmp_path / "model_final.pth")
        assert find_teacher(final) == (str(tmp_path / "config.yaml"), final)

    def test_none_is_no_obstacle_to_an_evaluation(self, full_yaml, tmp_path) -> None:
        (tmp_path / "config.yaml").write_text(full_yaml.read_text())
        cfg = student(full_yaml)
        cfg.MODEL.DISTILL.TEACHER.NAME, cfg.MODEL.DISTILL.TEACHER.WEIGHTS = str(tmp_path), ""
        model = build(cfg)
        assert model.teacher is None and model.eval()(make_batch())
        with pytest.raises(TeacherNotFoundError, match=r"TEACHER\.WEIGHTS"):
            train_losses(model)


class Store(PathHandler):
    """Files below a folder, by "store://"."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def _get_supported_prefixes(self) -> list[str]:
        return ["store://"]

    def _get_local_path(self, path, force=False, **_kwargs) -> str:
        return str(self.root / path.removeprefix("store://"))

    def _isfile(self, path, **_kwargs) -> bool:
        return Path(self._get_local_path(path)).is_file()

    def _isdir(self, path, **_kwargs) -> bool:
        return Path(self._get_local_path(path)).is_dir()

    def _open(self, path, mode="r", buffering=-1, **_kwargs):
        return open(self._get_local_path(path), mode, buffering)


@pytest.mark.parametrize("name", ["store://run", "store://run/model_final.pth"])
def test_a_teacher_by_a_path_handler(name, full_yaml, tmp_path) -> None:
    (tmp_path / "run").symlink_to(full_yaml.parent)
    PathManager.register_handler(Store(tmp_path), allow_override=True)
    teacher = FrozenTeacher.load_from(name)
    assert teacher.model.backbone.width == 12 and len(teacher.load().sha256) == 64


def test_a_teacher_by_an_address_that_is_not_there() -> None:
    with pytest.raises(TeacherNotFoundError, match=r"TEACHER\.NAME is 'http://127\.0\.0\.1"):
        find_teacher("http://127.0.0.1:9/teacher.yaml")
