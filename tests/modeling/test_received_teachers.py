"""A config, folder or checkpoint that was received runs none of its code as a teacher."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from omegaconf import OmegaConf

from ssim_kd.command_line import argument_parser
from ssim_kd.config import add_distill_config
from ssim_kd.config_files import allow_program
from ssim_kd.engine import load_config
from ssim_kd.modeling import FrozenTeacher, teacher_source
from ssim_kd.modeling.saved_lazy import find_part
from ssim_kd.modeling.teacher_config import source_of
from ssim_kd.modeling.teacher_files import TeacherNotFoundError
from tests.helpers import train_losses

RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.py"


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the payload makes; ``payload.py`` can be imported."""
    path = tmp_path / "ran"
    body = f"from pathlib import Path\nPath({str(path)!r}).touch()\n"
    folder = tmp_path / "received"
    folder.mkdir()
    model = f"from detectron2 import model_zoo\nmodel = model_zoo.get_config({RETINANET!r}).model\n"
    for name in ("payload.py", "config.py"):
        (folder / name).write_text(body + model)
    (folder / "model_final.pth").touch()
    monkeypatch.syspath_prepend(folder)
    yield path
    sys.modules.pop("payload", None)


@pytest.fixture
def folder(tmp_path: Path, ran: Path) -> Path:
    return tmp_path / "received"


def student(folder: Path, key: str = "NAME") -> Path:
    """A YAML that names the payload as the teacher."""
    teacher = {key: str(folder / "payload.py"), "WEIGHTS": str(folder / "model_final.pth")}
    distill = {"STUDENT_META_ARCHITECTURE": "RetinaNet", "TEACHER": teacher}
    model = {"META_ARCHITECTURE": "DistilledDetector", "DISTILL": distill, "DEVICE": "cpu"}
    path = folder / "student.yaml"
    path.write_text(yaml.safe_dump({"_BASE_": zoo("retinanet_R_50_FPN_1x.yaml"), "MODEL": model}))
    return path


def zoo(name: str) -> str:
    return str(Path(model_zoo.__file__).parent / "configs/COCO-Detection" / name)


def command(path: Path, *args: str):
    return load_config(argument_parser().parse_args(["--config-file", str(path), *args]))


class TestPrograms:
    @pytest.mark.parametrize("key", ["NAME", "CONFIG_FILE"])
    def test_a_config_names_one(self, key, folder, ran) -> None:
        cfg = command(student(folder, key))
        with pytest.raises(TeacherNotFoundError, match=r"TEACHER\.NAME.*payload\.py.*--teacher"):
            teacher_source(cfg)
        assert not ran.exists()

    def test_a_config_of_another_trainer_names_one(self, folder, ran) -> None:
        cfg = get_cfg()
        add_distill_config(cfg)
        cfg.merge_from_file(str(student(folder)), allow_unsafe=True)
        model = build_model(cfg)
        assert model.teacher is None
        with pytest.raises(TeacherNotFoundError, match=r"payload\.py"):
            train_losses(model)
        assert not ran.exists()
        allow_program(str(folder / "payload.py"))
        assert teacher_source(cfg).name and ran.exists()

    @pytest.mark.parametrize("how", ["--teacher", "MODEL.DISTILL.TEACHER.NAME"])
    def test_a_person_names_one(self, how, folder, ran) -> None:
        program = str(folder / "payload.py")
        weights = ("MODEL.DISTILL.TEACHER.WEIGHTS", str(folder / "model_final.pth"))
        cfg = command(student(folder), how, program, *weights)
        assert teacher_source(cfg).name == program and ran.exists()

    def test_code_names_one(self, folder, ran) -> None:
        FrozenTeacher.load_from(str(folder / "payload.py"), str(folder / "model_final.pth"))
        assert ran.exists()

    @pytest.mark.parametrize("name", ["", "model_final.pth"])
    def test_a_folder_holds_one(self, name, folder, ran) -> None:
        with pytest.raises(TeacherNotFoundError, match=r"config\.yaml"):
            source_of(str(folder / name))
        assert not ran.exists()

    def test_a_folder_of_transformers_holds_one(self, folder, ran, monkeypatch) -> None:
        pytest.importorskip("transformers", reason="the extra detr is not installed")
        monkeypatch.setattr("builtins.input", lambda _: "y")
        parts = ("AutoConfig", "AutoModelForObjectDetection")
        received = {"model_type": "new", "auto_map": dict.fromkeys(parts, "payload.model")}
        (folder / "config.json").write_text(json.dumps(received))
        (folder / "model.safetensors").touch()
        with pytest.raises(ValueError, match="received"):
            source_of(str(folder)).structure()
        assert not ran.exists()


@pytest.mark.parametrize(
    "override", ["model.backbone._target_=os.system", "model={_target_: os.system, command: id}"]
)
def test_overrides_of_a_config_call_parts_only(override, folder) -> None:
    cfg = command(student(folder))
    cfg.defrost()
    node = cfg.MODEL.DISTILL.TEACHER
    node.NAME, node.OPTS = RETINANET, [override]
    with pytest.raises(ValueError, match=r"os\.system"):
        teacher_source(cfg)
    node.OPTS = ["model.num_classes=3"]
    assert teacher_source(cfg).build("meta").num_classes == 3


CALLS = [
    "os.system",
    "builtins.eval",
    "payload.Model",
    "detectron2.config.LazyConfig.load",
    "detectron2.modeling.backbone.fpn.math.sqrt",
    "detectron2.modeling.backbone.fpn.nn.init.ones_",
    "detectron2.modeling.build_model",
    "detectron2.modeling...payload",
    "detectron2.layers.nms.torch.load",
    "ssim_kd.modeling.teacher_config.load_lazy_file",
    "ssim_kd.modeling.FrozenTeacher.load_from",
    "ssim_kd.config_files.load_lazy_file",
    "torch.nn.init.ones_",
    "torch.nn.Module.load_state_dict",
    "torch.hub.load",
    "torch.nn.modules.module.torch.hub.load",
]


# Lists of lists, 9 ** 8 values.
ALIASES = "a0: &a0 [" + "0, " * 9 + "]\n"
ALIASES += "".join(f"a{i}: &a{i} [" + f"*a{i - 1}, " * 9 + "]\n" for i in range(1, 8))


class TestSavedLazyConfigs:
    @pytest.mark.parametrize("call", CALLS)
    def test_a_call_of_no_part(self, call, folder, ran) -> None:
        config = {"model": {"_target_": "torch.nn.Sequential", "args": [{"_target_": call}]}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(ValueError) as caught:
            source_of(str(folder))
        assert repr(call) in str(caught.value) and "WEIGHTS" in str(caught.value)
        assert not ran.exists() and "payload" not in sys.modules

    @pytest.mark.parametrize(
        "text",
        [
            "model: !!python/object/apply:os.system [id]",
            "model: {x: !!python/name:os.system ''}",
            "model: {_target_: {_target_: os.system}}",
            "model: {_target_: '${other.name}', args: []}\nother: {name: os.system}",
            "model: {_target_: '${oc.decode:os.system}'}",
            "model: {_target_: torch.nn.Sequential, args: &a [*a]}",
            "model: [1]",
            ALIASES + "model: {a: *a7, _target_: torch.nn.Identity}",
        ],
    )
    def test_a_hostile_file(self, text, folder) -> None:
        (folder / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"TEACHER\.NAME"):
            source_of(str(folder))

    def test_the_rest_of_the_file_is_not_made(self, folder, ran) -> None:
        config = "model: {_target_: torch.nn.Identity}\nx: !!python/module:payload ''\n"
        (folder / "config.yaml").write_text(config)
        assert isinstance(source_of(str(folder)).build("cpu"), torch.nn.Identity)
        assert not ran.exists()

    def test_the_folder_of_a_run_is_a_teacher(self, tmp_path) -> None:
        config = OmegaConf.create({"model": model_zoo.get_config(RETINANET).model})
        config.model.backbone.bottom_up.stem.out_channels = 8
        config.model.num_classes = 3
        config.dataloader = {"train": {"mapper": {"image_format": "RGB"}}}
        detector = instantiate(config.model)
        LazyConfig.save(config, str(tmp_path / "config.yaml"))
        torch.save({"model": detector.state_dict()}, tmp_path / "model_final.pth")
        teacher = FrozenTeacher.load_from(str(tmp_path), fold_bn=False)
        assert teacher.input_format == "RGB"
        found = teacher.load(["p3"]).backbone.state_dict()
        assert all(torch.equal(found[k], v) for k, v in detector.backbone.state_dict().items())

    def test_classes_as_values(self, folder) -> None:
        """As regnets and ViTs have them."""
        norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
        config = {"model": {"_target_": "torch.nn.Identity", "norm": norm, "kind": torch.nn.GELU}}
        (folder / "config.yaml").write_text(yaml.dump(config))
        assert isinstance(source_of(str(folder)).build("cpu"), torch.nn.Identity)


@pytest.mark.parametrize(
    "name",
    [
        "detectron2.modeling.RetinaNet",
        "detectron2.modeling.backbone.resnet.ResNet.make_default_stages",
        "detectron2.modeling.box_regression.Box2BoxTransform",
        "detectron2.modeling.matcher.Matcher",
        "detectron2.layers.shape_spec.ShapeSpec",
        "ssim_kd.modeling.TimmBackbone",
        "torch.nn.modules.linear.Linear",
    ],
)
def test_find_part(name) -> None:
    assert find_part(name).__qualname__ == name.partition(".backbone.resnet.")[2] or (
        find_part(name).__name__ == name.rpartition(".")[2]
    )
