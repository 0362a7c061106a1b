"""LazyConfig students and teachers through the command line."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate

from ssim_kd.config_loading import load_lazy
from ssim_kd.engine import argument_parser, run
from ssim_kd.engine.lazy import LazyRecipe
from ssim_kd.modeling import DistilledDetector, FrozenTeacher
from ssim_kd.projects.icd import ICDDistiller
from tests.engine.runs import World, assert_same, checkpoint, log, metrics

# A RetinaNet of the zoo made small; the teacher is another LazyConfig with another width.
BASE = """
from detectron2 import model_zoo
from detectron2.config import LazyCall as L, get_cfg
from detectron2.layers import ShapeSpec
from ssim_kd import DistilledDetector, FrozenTeacher, SSIMDistiller, add_distill_config
from ssim_kd.data import register_digits
from ssim_kd.projects.icd import ICDDistiller

_cfg = get_cfg()
add_distill_config(_cfg)
_cfg.merge_from_file("{student_yaml}")
register_digits(_cfg)

_zoo = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
model, optimizer, dataloader, train = _zoo.model, _zoo.optimizer, _zoo.dataloader, _zoo.train
lr_multiplier = _zoo.lr_multiplier
model.num_classes = 10
model.pixel_std = [57.0, 57.0, 57.0]
model.backbone.bottom_up.freeze_at = 0
model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = "BN"
model.backbone.bottom_up.stem.out_channels = 16
_stages = model.backbone.bottom_up.stages
del _stages["depth"]
_stages._target_ = "{module}.small_stages"
model.backbone.out_channels = model.backbone.top_block.out_channels = {width}
model.backbone.top_block.in_channels = 128
model.head.conv_dims, model.head.input_shape = [{width}], [ShapeSpec(channels={width})] * 5
dataloader.train.dataset.names, dataloader.test.dataset.names = "digits_train", "digits_val"
dataloader.train.total_batch_size, dataloader.train.num_workers = 2, 0
dataloader.test.num_workers = 0
dataloader.train.mapper.use_instance_mask = False
dataloader.train.mapper.augmentations[0].short_edge_length = (96,)
dataloader.test.mapper.augmentations[0].short_edge_length = 96
train.device, train.max_iter, train.eval_period, train.log_period = "cpu", 2, 2, 1
train.init_checkpoint, train.checkpointer.period = "", 1
"""
STUDENT = """
model = L(DistilledDetector)(
    student=model,
    teacher=L(FrozenTeacher.load_from)(name="{teacher}", weights="{weights}"),
    distillers=[
        L(SSIMDistiller)(weight=4.0, levels=["p3", "p4"]),
        L(ICDDistiller)(dim=16, heads=2, levels=["p5", "p6"]),
    ],
    max_iter="${{..train.max_iter}}",
)
"""
MODULE = '''
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock

def small_stages(stride_in_1x1=True, norm="BN"):
    """ResNet.make_default_stages of depth 50 with an eighth of the width."""
    return [
        ResNet.make_stage(
            block_class=BottleneckBlock,
            num_blocks=1, stride_per_block=[1 if i == 0 else 2],
            in_channels=16 * 2 ** max(i - 1, 0), out_channels=16 * 2**i,
            bottleneck_channels=4 * 2**i, norm=norm, stride_in_1x1=stride_in_1x1,
        )
        for i in range(4)
    ]
'''


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The files of a student and a teacher, and the teacher's random weights."""
    folder = tmp_path_factory.mktemp("lazy")
    world = World(folder)
    module = folder / "small_resnet_of_lazy_test.py"
    module.write_text(MODULE)
    sys.path.insert(0, str(folder))
    files = {"weights": folder / "lazy_teacher.pth"}
    for name, width in (("teacher", 48), ("student", 32), ("plain", 32), ("fcos", 32)):
        text = BASE.format(
            student_yaml=world.config, module="small_resnet_of_lazy_test", width=width
        )
        if name == "fcos":
            # Its P6 is made of P5, and its P7 has one value.
            text = text.replace("retinanet_R_50", "fcos_R_50").replace("= 128", "= 32")
            text += "model.head.norm = ''\n"
        if name == "student":
            text += STUDENT.format(teacher=files["teacher"], weights=files["weights"])
        files[name] = folder / f"lazy_{name}.py"
        files[name].write_text(text)
        if name == "teacher":
            torch.manual_seed(3)
            model = instantiate(LazyConfig.load(str(files[name])).model)
            torch.save({"model": model.state_dict()}, files["weights"])
    yield files
    sys.path.remove(str(folder))


def lazy_run(config: Path, folder: Path, *opts: str):
    flags = [o for o in opts if o.startswith("--")]
    rest = [o for o in opts if not o.startswith("--")]
    arguments = ["--config-file", str(config), *flags, f"train.output_dir={folder}", *rest]
    return run(argument_parser().parse_args(arguments))


def test_lazy_main_trains_resumes_and_evaluates_the_student_alone(configs, tmp_path) -> None:
    results = lazy_run(configs["student"], tmp_path)
    assert "bbox" in results
    saved = checkpoint(tmp_path)
    assert saved["iteration"] == 1 and set(saved) == {"model", "distillers", "trainer", "iteration"}
    assert set(saved["distillers"]) >= {"ssim.adapters.p3.weight"}
    assert {"distill/ssim_p3", "loss_distill", "loss_cls"} <= set().union(*metrics(tmp_path))
    # What is a method's own is written, and what is given stays.
    ssim, icd = LazyConfig.load(str(tmp_path / "config.yaml")).model.distillers
    assert (ssim.weight, ssim.levels, ssim.adapter) == (4.0, ["p3", "p4"], "auto")
    assert (icd.weight, icd.dim, icd.max_boxes, icd.part_weights.value) == (1.0, 16, 300, 8.0)
    # The zoo's SGD, and the AdamW that ICD asks for.
    sgd, adamw = saved["trainer"]["optimizer"]["optimizers"]
    assert "momentum_buffer" in sgd["state"][0] and "exp_avg_sq" in adamw["state"][0]

    lazy_run(configs["student"], tmp_path, "--resume", "train.max_iter=3")
    again = checkpoint(tmp_path)
    assert again["iteration"] == 2
    assert "Resuming from" in log(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "distill/ssim_p3: " in page and "3 iterations" in page and "digits_val" in page

    # The teacher's weights are gone: evaluation does not ask for them.
    weights = configs["weights"]
    weights.rename(weights.with_suffix(".gone"))
    try:
        opts = ("--eval-only", f"train.init_checkpoint={tmp_path / 'model_final.pth'}")
        assert "bbox" in lazy_run(configs["student"], tmp_path / "evaluation", *opts)
    finally:
        weights.with_suffix(".gone").rename(weights)
    # The config of the student without its teacher, which stock Detectron2 reads.
    cfg = LazyConfig.load(str(tmp_path / "student.yaml"))
    assert "teacher" not in cfg.model and "optimizer" in cfg and "lr_multiplier" in cfg
    result = instantiate(cfg.model).load_state_dict(again["model"])
    assert not result.missing_keys and not result.unexpected_keys


def test_lazy_main_resumes_the_loss_normalizer_of_fcos(configs, tmp_path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    opts = ("train.eval_period=0", "train.seed=1")
    lazy_run(configs["fcos"], whole, *opts)
    cut.mkdir()
    shutil.copy(whole / "model_0000000.pth", cut)
    lazy_run(configs["fcos"], cut, "--resume", *opts)
    saved = checkpoint(whole)
    assert saved["trainer"]["hooks"]["RankStates"]["loss_normalizer"] != [100.0]
    assert_same(saved, checkpoint(cut))


def test_lazy_main_puts_a_plain_model_below_its_teacher(configs, tmp_path) -> None:
    lazy_run(
        configs["plain"],
        tmp_path,
        f"--teacher={configs['teacher']}",
        f"model.teacher.weights={configs['weights']}",
        "model.distillers.0.weight=2.0",
        # As without a teacher.
        "model.head.prior_prob=0.02",
        "train.max_iter=1",
        "train.eval_period=0",
    )
    found = next(line for line in metrics(tmp_path) if "distill/ssim_p3" in line)
    assert found["distill/ssim_p3_weighted"] == pytest.approx(2 * found["distill/ssim_p3"])
    cfg = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert cfg.model.student.head.prior_prob == 0.02 and "head" not in cfg.model
    assert cfg.model.teacher.name == str(configs["teacher"])


def test_load_lazy_with_another_teacher(configs) -> None:
    arguments = ["--config-file", str(configs["student"]), "--teacher", "other.py"]
    cfg = load_lazy(argument_parser().parse_args(arguments)).cfg
    # Its weights were the other one's; what is learned from it stays.
    assert dict(cfg.model.teacher).keys() == {"_target_", "name"}
    assert cfg.model.teacher.name == "other.py" and len(cfg.model.distillers) == 2
    assert "student" not in cfg.model.student


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.max_iter", "key=value"),
        ("trian.max_iter=7", r"train\.max_iter.* \+trian\.max_iter"),
        ("train.evaluation_period=7", r"train\.evaluation_period .*\+train\.evaluation_period"),
        ("model.distillers.7.weight=1", r"model\.distillers\.7\.weight"),
        ("MODEL.DISTILL.NAME=PKDDistiller", r"model\.distillers\.0\._target_=PKDDistiller"),
    ],
)
def test_load_lazy_with_a_wrong_override(override, named, configs) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        load_lazy(
            argument_parser().parse_args(["--config-file", str(configs["student"]), override])
        )
    assert override.partition("=")[0] in str(caught.value)


def test_load_lazy_with_keys_that_the_config_lacks(configs) -> None:
    opts = ["train.accumulate=2", "train.ddp.gradient_as_bucket_view=True", "+mine.key=3"]
    opts += ["model.distillers.0.levels=[p3]", "optimizer.nesterov=True"]
    cfg = load_lazy(
        argument_parser().parse_args(["--config-file", str(configs["student"]), *opts])
    ).cfg
    assert (cfg.train.accumulate, cfg.mine.key, cfg.optimizer.nesterov) == (2, 3, True)
    assert cfg.train.ddp.gradient_as_bucket_view and cfg.model.distillers[0].levels == ["p3"]


def test_load_lazy_with_a_method_by_its_name(configs) -> None:
    line = ["--config-file", str(configs["plain"]), "--teacher", "x.py"]
    line += ["model.distillers.0._target_=ICDDistiller", "model.distillers.0.dim=16"]
    (node,) = load_lazy(argument_parser().parse_args(line)).cfg.model.distillers
    assert type(instantiate(node)) is ICDDistiller and node.dim == 16


def test_load_lazy_names_the_line_of_an_error(tmp_path) -> None:
    config = tmp_path / "wrong.py"
    config.write_text("model = {}\n\nmodel.width = 3\n")
    with pytest.raises(ValueError, match=r"wrong\.py, line 3 .*AttributeError"):
        load_lazy(argument_parser().parse_args(["--config-file", str(config)]))


def test_a_yaml_student_learns_from_a_lazy_teacher(configs, tmp_path_factory, tmp_path) -> None:
    world = World(tmp_path_factory.mktemp("yaml"))
    opts = ("MODEL.DISTILL.TEACHER.NAME", str(configs["teacher"]))
    opts += ("MODEL.DISTILL.TEACHER.WEIGHTS", str(configs["weights"]))
    world.main(tmp_path, *opts, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()", "DATASETS.TEST", "()")
    assert {"distill/ssim_p3", "distill/ssim_p6"} <= set(metrics(tmp_path)[-1])
    assert "RetinaNet" in log(tmp_path)


@pytest.mark.parametrize(
    "name", ["new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py", "COCO-Detection/fcos_R_50_FPN_1x.py"]
)
def test_a_lazy_config_of_the_zoo_is_a_teacher(name) -> None:
    if "fcos" in name:
        with pytest.raises(ValueError, match="WEIGHTS"):
            FrozenTeacher.load_from(name)
        teacher = FrozenTeacher.load_from(name, "somewhere.pth")
    else:
        teacher = FrozenTeacher.load_from(name)
    # Only its structure: nothing was downloaded.
    assert {p.device.type for p in teacher.model.backbone.parameters()} == {"meta"}
    assert teacher.input_format == "BGR"
    assert {"p3", "p4", "p5"} <= set(teacher.levels)


def test_distilled_detector_is_instantiated_from_a_lazy_config(configs) -> None:
    model = instantiate(LazyConfig.load(str(configs["student"])).model)
    assert type(model) is DistilledDetector and model.max_iter == 2
    assert model.distillers["ssim"].levels == ["p3", "p4"]


def test_load_lazy_home(configs, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = ["--config-file", str(configs["student"]), "train.output_dir='~/out'"]
    cfg = load_lazy(argument_parser().parse_args(arguments)).cfg
    assert cfg.train.output_dir == f"{tmp_path}/out"


def test_lazy_main_of_a_shipped_config_by_its_name(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        lazy_run(
            Path("COCO-Detection/plain_fcos_R_50_FPN_1x.py"), tmp_path, "train.init_checkpoint=''"
        )
    # What follows default_setup: its data are not here.
    error = capfd.readouterr().err
    assert "ERROR: dataloader.train.dataset.names" in error and "coco_2017_train" in error
    assert "plain_fcos_R_50_FPN_1x.py:" in log(tmp_path)
    assert (tmp_path / "config.yaml").is_file()


def test_lazy_main_runs_a_file_that_registers_data_once(configs, tmp_path) -> None:
    config = tmp_path / "registers.py"
    register = (
        "from detectron2.data.datasets import register_coco_instances\n"
        f"register_coco_instances('{tmp_path.name}', {{}}, 'a.json', 'a')\n"
    )
    config.write_text(configs["teacher"].read_text() + register)
    lazy_run(config, tmp_path / "out", "train.max_iter=1", "train.eval_period=0")
    assert checkpoint(tmp_path / "out")["iteration"] == 0
    # As a teacher it is read several times, with overrides that do not stay.
    for width in (8, 16):
        opts = [f"model.backbone.top_block.out_channels={width}"]
        teacher = FrozenTeacher.load_from(str(config), weights=str(configs["weights"]), opts=opts)
        assert teacher is not None


def test_lazy_main_evaluates_the_teacher_by_itself(configs, tmp_path) -> None:
    opts = ("--teacher", configs["teacher"], f"model.teacher.weights={configs['weights']}")
    arguments = ["--config-file", str(configs["plain"]), "--eval-teacher", *map(str, opts)]
    results = run(argument_parser().parse_args([*arguments, f"train.output_dir={tmp_path}"]))
    assert "bbox" in results and not list(tmp_path.glob("*.pth"))


def test_lazy_main_gives_ddp_its_options_and_the_teacher_its_channels(configs, tmp_path) -> None:
    arguments = ["--config-file", str(configs["plain"]), "--teacher", str(configs["teacher"])]
    opts = [f"train.output_dir={tmp_path}", "dataloader.train.mapper.image_format=RGB"]
    opts += ["train.ddp.find_unused_parameters=True", f"model.teacher.weights={configs['weights']}"]
    recipe = LazyRecipe(argument_parser().parse_args([*arguments, *opts]))
    assert recipe.settings().ddp["find_unused_parameters"] is True
    training = recipe.training()
    assert training.settings.image_format == "RGB"
    assert training.model.teacher.options.image_format == "RGB"
