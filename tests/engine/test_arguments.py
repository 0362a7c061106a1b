"""--teacher, --data, --epochs and --batch: which keys they set, and distillation by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.utils.events import EventStorage

from ssim_kd.config import add_distill_config
from ssim_kd.config_loading.yaml_config import ignored_keys, load_yaml
from ssim_kd.data import check_datasets, register_datasets
from ssim_kd.engine import DistillTrainer, argument_parser, distill, load_config, main
from ssim_kd.engine.settings import Settings
from ssim_kd.engine.train_loop import DistillStep
from ssim_kd.modeling import DistilledDetector, SSIMDistiller
from ssim_kd.projects import add_project_configs
from tests.engine.runs import ROOT, World, checkpoint, log, metrics
from tests.helpers import build, make_batch, stock_config


def cfg_of(*arguments: Any):
    args = argument_parser().parse_args([str(a) for a in arguments])
    loaded = load_yaml(args, add_project_configs)
    return loaded.cfg, loaded


@pytest.fixture(scope="module")
def plain(world: World) -> Path:
    """A stock config: no key of ours but the data's."""
    path = world.folder / "stock.yaml"
    ours = str(ROOT / "configs/COCO-Detection/Base-RCNN-FPN.yaml")
    text = world.config.read_text().replace(ours, model_zoo.get_config_file("Base-RCNN-FPN.yaml"))
    lines = [x for x in text.splitlines() if "DISTILL" not in x and "TEACHER" not in x]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def teacher_run(world: World, tmp_path_factory) -> Path:
    """The folder of a teacher's run."""
    folder = tmp_path_factory.mktemp("teacher_run")
    short = ("SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()", "DATASETS.TEST", "()")
    config = world.teacher_config
    world.main(folder, "MODEL.DISTILL.ENABLED", "False", *short, config=config)
    return folder


@pytest.mark.parametrize("form", ["folder", "checkpoint", "config"])
def test_apply_teacher_of_a_run(form, world, plain, teacher_run, tmp_path) -> None:
    name = {
        "folder": teacher_run,
        "checkpoint": teacher_run / "model_final.pth",
        "config": teacher_run / "config.yaml",
    }[form]
    cfg, _ = cfg_of("--config-file", plain, "--teacher", name)
    assert cfg.MODEL.META_ARCHITECTURE == "DistilledDetector"
    assert cfg.MODEL.DISTILL.STUDENT_META_ARCHITECTURE == "GeneralizedRCNN"
    args = argument_parser().parse_args(
        ["--config-file", str(plain), "--teacher", str(name), "OUTPUT_DIR", str(tmp_path)]
        + ["SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()", "DATASETS.TEST", "()"]
    )
    main(args, add_project_configs)
    assert "loss_distill" in metrics(tmp_path)[-1]
    saved = torch.load(teacher_run / "model_final.pth")["model"]
    assert any(k.startswith("backbone.") for k in saved) and "distillers" in checkpoint(tmp_path)


def test_without_teacher_the_same_line_is_the_control(plain, tmp_path) -> None:
    args = argument_parser().parse_args(
        ["--config-file", str(plain), "OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", "1"]
        + ["SOLVER.STEPS", "()", "DATASETS.TEST", "()"]
    )
    main(args, add_project_configs)
    assert "loss_distill" not in metrics(tmp_path)[-1]


def test_apply_teacher_names_of_the_zoo(plain) -> None:
    for name in (
        "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml",
        "new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py",
    ):
        cfg, _ = cfg_of("--config-file", plain, "--teacher", name)
        assert name == cfg.MODEL.DISTILL.TEACHER.NAME


def data_file(folder: Path, *, categories: int = 3, name: str | None = "parts") -> Path:
    folder.mkdir(exist_ok=True)
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 96, "width": 96} for i in range(8)],
        "annotations": [
            {
                **{"id": i + 1, "image_id": i, "category_id": 1, "bbox": [8, 8, 40, 40]},
                **{"area": 1600, "iscrowd": 0},
            }
            for i in range(8)
        ],
        "categories": [{"id": k + 1, "name": f"class{k}"} for k in range(categories)],
    }
    for split in ("train", "val"):
        (folder / f"{split}.json").write_text(json.dumps(content))
        (folder / split).mkdir(exist_ok=True)
    lines = [f"name: {name}"] if name else []
    lines += [f"{split}: {{json: {split}.json, images: {split}}}" for split in ("train", "val")]
    path = folder / "data.yaml"
    path.write_text("\n".join(lines))
    return path


def test_apply_data_sets_names_and_classes(tmp_path) -> None:
    path = data_file(tmp_path / "parts")
    cfg, loaded = cfg_of(
        *("--config-file", "COCO-Detection/retinanet_R_50_FPN_1x.yaml", "--data", path)
    )
    assert cfg.DATASETS.TRAIN == ("parts_train",) and cfg.DATASETS.TEST == ("parts_val",)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    entry = next(e for e in cfg.DATASETS.REGISTER_COCO if e[0] == "parts_train")
    assert entry[1:] == [str(tmp_path / "parts/train.json"), str(tmp_path / "parts/train")]
    assert any("3 classes" in note for note in loaded.notes)
    # The same in a config file that is a base.
    (tmp_path / "base.yaml").write_text("DATASETS: {DATA_FILE: parts/data.yaml}\n")
    again, _ = cfg_of("--config-file", tmp_path / "base.yaml")
    assert again.DATASETS.REGISTER_COCO == cfg.DATASETS.REGISTER_COCO


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("train: here", ("train", "json")),
        ("val: {json: a, images: b}", ("train",)),
        ("train: {json: a, images: b, extra: c}", ("extra", "images")),
        ("train: {json: gone.json, images: b}", ("gone.json",)),
        ("[1, 2", ("data.yaml",)),
    ],
)
def test_apply_data_of_another_form(text, named, tmp_path) -> None:
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        cfg_of("--data", tmp_path / "data.yaml")
    assert all(name in str(caught.value) for name in named)


def test_apply_data_with_other_classes_in_the_config(tmp_path) -> None:
    path = data_file(tmp_path / "parts")
    (tmp_path / "mine.yaml").write_text("MODEL: {ROI_HEADS: {NUM_CLASSES: 7}}\n")
    with pytest.raises(ValueError, match=r"MODEL\.ROI_HEADS\.NUM_CLASSES") as caught:
        cfg_of("--config-file", tmp_path / "mine.yaml", "--data", path)
    assert "7" in str(caught.value) and "3" in str(caught.value)


def test_apply_schedule_by_hand_worked_numbers(tmp_path) -> None:
    path = data_file(tmp_path / "parts")  # 8 images
    config = ("--config-file", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "--data", path)
    # The zoo: batch 16, LR 0.02, 90000 iterations, steps at 60000 and 80000.
    cfg, loaded = cfg_of(*config, "--epochs", 90, "--batch", 4)
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER) == (4, 0.005, 180)
    assert solver.STEPS == (120, 160) and solver.WARMUP_ITERS == 45
    assert cfg.TEST.EVAL_PERIOD == 2
    assert any("MAX_ITER 180" in note for note in loaded.notes)
    # Without epochs a batch keeps the number of images that are seen.
    cfg, _ = cfg_of(*config, "--batch", 8)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (0.01, 180000)
    assert cfg.SOLVER.STEPS == (120000, 160000)
    # What is set by hand stays.
    hand = ("SOLVER.BASE_LR", 0.3, "SOLVER.STEPS", "(7,)", "SOLVER.WARMUP_ITERS", 5)
    cfg, _ = cfg_of(*config, "--epochs", 90, "--batch", 4, *hand)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS) == (0.3, (7,), 5)
    # The key says the same as the flag.
    cfg, _ = cfg_of(*config, "SOLVER.EPOCHS", 4.0)
    assert cfg.SOLVER.MAX_ITER == 2


def test_apply_schedule_of_two_lengths(tmp_path) -> None:
    path = data_file(tmp_path / "parts")
    with pytest.raises(ValueError, match=r"SOLVER\.EPOCHS") as caught:
        cfg_of("--data", path, "SOLVER.EPOCHS", 2.0, "SOLVER.MAX_ITER", 7)
    assert "SOLVER.MAX_ITER" in str(caught.value)
    # A pair wins over a flag, and over the config file. The zoo: steps at 60000 and 80000 of 90000.
    config = tmp_path / "epochs.yaml"
    config.write_text(
        f"_BASE_: {model_zoo.get_config_file('COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml')}\n"
        "SOLVER: {EPOCHS: 2.0}\n"
    )
    line = ("--config-file", config, "--data", path)
    for flags in ((), ("--epochs", 3)):
        cfg, loaded = cfg_of(*line, *flags, "SOLVER.MAX_ITER", 9, "SOLVER.IMS_PER_BATCH", 4)
        assert cfg.SOLVER.MAX_ITER == 9 and cfg.SOLVER.STEPS == (6, 8)
        assert any("SOLVER.MAX_ITER 9 " in note and "--epochs" in note for note in loaded.notes)
    cfg, _ = cfg_of(*line, "--epochs", 3, "--batch", 2, "SOLVER.EPOCHS", 5.0)
    assert cfg.SOLVER.MAX_ITER == 20
    cfg, _ = cfg_of(*line, "--batch", 2, "SOLVER.IMS_PER_BATCH", 4)
    assert cfg.SOLVER.IMS_PER_BATCH == 4 and cfg.SOLVER.MAX_ITER == 4


def test_apply_schedule_of_a_short_epoch(tmp_path) -> None:
    line = ("--config-file", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    line += ("--data", data_file(tmp_path / "parts"))  # 8 images
    # 2 iterations: 1.33 and 1.78 of them are the steps.
    cfg, _ = cfg_of(*line, "--epochs", 1, "--batch", 4)
    assert cfg.SOLVER.MAX_ITER == 2 and cfg.SOLVER.STEPS == (1,)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    DistillTrainer.build_lr_scheduler(cfg, optimizer)
    # 6 iterations: at 4 and 5; one checkpoint an epoch of 2.
    cfg, _ = cfg_of(*line, "--epochs", 3, "--batch", 4)
    assert cfg.SOLVER.STEPS == (4, 5)
    assert (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (2, 2)
    cfg, _ = cfg_of(*line, "--epochs", 3, "--batch", 4, "SOLVER.CHECKPOINT_PERIOD", 1)
    assert cfg.SOLVER.CHECKPOINT_PERIOD == 1
    with pytest.raises(ValueError, match=r"--epochs .*0\.1.* --batch .*16.* 8 images"):
        cfg_of(*line, "--epochs", 0.1)


@pytest.mark.parametrize(
    "flags", [("--epochs", 0), ("--epochs", -1), ("--epochs", "inf"), ("--batch", 0)]
)
def test_apply_schedule_of_no_length(flags, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"{flags[0]} is"):
        cfg_of("--config-file", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", *flags)


def test_apply_schedule_of_data_with_a_fault(tmp_path) -> None:
    path = data_file(tmp_path / "faulty")
    content = json.loads((tmp_path / "faulty/train.json").read_text())
    content["annotations"][2]["category_id"] = 9
    (tmp_path / "faulty/train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN.*train\.json.*category_id"):
        cfg_of("--data", path, "--epochs", 1)


def test_apply_data_of_a_json_of_coco(tmp_path) -> None:
    data_file(tmp_path / "parts")
    with pytest.raises(ValueError, match=r"YAML") as caught:
        cfg_of("--data", tmp_path / "parts/val.json")
    text = str(caught.value)
    assert "'images'" in text and "'categories'" in text
    assert "0.png" not in text and len(text.replace(str(tmp_path), "")) < 350


@pytest.mark.parametrize("split", ["train", "val"])
def test_apply_data_that_names_a_missing_json(split, tmp_path) -> None:
    path = data_file(tmp_path / f"lacks_{split}", name=f"lacks_{split}")
    (path.parent / f"{split}.json").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{split}\.json") as caught:
        cfg, _ = cfg_of("--data", path)
        register_datasets(cfg)
        check_datasets(cfg, train=True)
    text = str(caught.value)
    assert f"entry '{split}'" in text and str(path) in text and "REGISTER_COCO" not in text


def test_a_teacher_or_method_without_effect_is_told() -> None:
    cfg = get_cfg()
    add_distill_config(cfg)
    distill = cfg.MODEL.DISTILL
    cfg.MODEL.META_ARCHITECTURE, distill.ENABLED = "DistilledDetector", False
    assert ignored_keys(cfg) == []  # a plain student
    distill.NAME, distill.TEACHER.NAME = "MyDistiller", "teacher.yaml"
    (note,) = ignored_keys(cfg)
    for text in (
        "MODEL.DISTILL.ENABLED is False",
        "DISTILL.NAME MyDistiller",
        "TEACHER.NAME teacher.yaml",
    ):
        assert text in note
    distill.ENABLED = True
    assert ignored_keys(cfg) == []
    distill.ENABLED, cfg.MODEL.META_ARCHITECTURE = False, "RetinaNet"
    assert ignored_keys(cfg) == []


def test_use_cpu_without_gpu_unless_set_by_hand(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = ("--config-file", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg, loaded = cfg_of(*config)
    assert cfg.MODEL.DEVICE == "cpu" and any("MODEL.DEVICE" in note for note in loaded.notes)
    with pytest.raises(ValueError, match=r"MODEL\.DEVICE"):
        load_config(argument_parser().parse_args([*config, "MODEL.DEVICE", "cuda"]))


def test_distill_by_config_returns_the_trainer(world, plain, teacher_run, tmp_path) -> None:
    opts = ("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()", "TEST.EVAL_PERIOD", 1)
    trainer = distill(str(plain), str(teacher_run), output_dir=str(tmp_path), opts=opts)
    assert isinstance(trainer.model, DistilledDetector) and trainer.iter == 2
    # The best of two evaluations; of equal ones the later.
    evaluated = [x["bbox/AP"] for x in metrics(tmp_path) if "bbox/AP" in x]
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert best["iteration"] == max(range(2), key=lambda i: (evaluated[i], i))
    assert "model_best.pth" in log(tmp_path)


def test_distill_of_modules(tmp_path) -> None:
    student, teacher = build(stock_config("faster")), build(stock_config("mask", fpn=48), seed=1)
    before = student.backbone.fpn_output2.weight.detach().clone()
    trainer = distill(
        *(student, teacher),
        loader=[make_batch(((64, 64),))] * 3,
        max_iter=3,
        distillers=[SSIMDistiller(levels=["p2", "p3"])],
        output_dir=str(tmp_path),
    )
    assert trainer.student is student
    assert not torch.equal(student.backbone.fpn_output2.weight, before)
    assert set(checkpoint(tmp_path)["model"]) == set(student.state_dict())
    assert "loss_distill: " in (tmp_path / "report.html").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="loader"):
        distill(student, teacher)


@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_accumulate_equals_the_whole_batch(kind) -> None:
    """All anchors and proposals are sampled, so that no draw depends on the order of images."""

    everything = ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 10**6, "MODEL.RPN.POSITIVE_FRACTION", 1.0)
    gradients = []
    for accumulate in (1, 2):
        model = build(stock_config(kind, *everything, "MODEL.RESNETS.NORM", "FrozenBN"))
        model.roi_heads.batch_size_per_image, model.roi_heads.positive_fraction = 10**6, 1.0
        batch = [x for seed in range(4) for x in make_batch(((64, 64),), seed=seed)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = DistillStep(model, [batch], optimizer, Settings(".", 1, accumulate=accumulate))
        step.iter = step.start_iter = 0
        step.max_iter = 1
        with EventStorage(0):
            step.run_step()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    whole, parts = gradients
    assert whole.keys() == parts.keys()
    norm = torch.stack([g.norm() for g in whole.values()]).norm()
    error = torch.stack([(whole[n] - parts[n]).norm() for n in whole]).norm()
    assert float(error / norm) < 1e-5


def test_register_datasets_of_a_data_file(tmp_path) -> None:

    cfg, _ = cfg_of("--data", data_file(tmp_path / "cogs", name=None))
    register_datasets(cfg)
    assert cfg.DATASETS.TRAIN == ("data_train",) and len(DatasetCatalog.get("data_train")) == 8


def test_apply_teacher_that_is_not_there_stops_before_anything_is_built(plain, tmp_path) -> None:
    for name, near in (
        ("COCO-Detection/faster_rcnn_R101_FPN_3x.yaml", "faster_rcnn_R_101_FPN_3x"),
        (str(tmp_path), "config.yaml"),
    ):
        arguments = ["--config-file", str(plain), "--teacher", name]
        args = argument_parser().parse_args([*arguments, "OUTPUT_DIR", str(tmp_path / "run")])
        with pytest.raises(ValueError, match=r"MODEL\.DISTILL\.TEACHER\.NAME") as caught:
            main(args, add_project_configs)
        assert near in str(caught.value)
        assert not (tmp_path / "run" / "metrics.json").exists()


def test_argument_parser_examples() -> None:
    """What -h shows is a command line that is read."""
    text = argument_parser().epilog.replace("\\\n", " ")
    lines = [line.split("$ ")[1].split() for line in text.splitlines() if "$ " in line]
    read = [argument_parser().parse_args(words[1:]) for words in lines if "<URL>" not in words]
    assert len(read) == 5
    assert {args.teacher for args in read} > {"output/teacher", ""}
    assert [args.data for args in read if args.data] == ["data.yaml"]
    assert sum(args.resume for args in read) == sum(args.eval_only for args in read) == 1
