"""From the command line to a config: what wins over what, in both languages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from omegaconf import OmegaConf

from ssim_kd.config_files import Loaded
from ssim_kd.config_loading import load_lazy, load_yaml
from ssim_kd.engine import argument_parser, load_config
from ssim_kd.projects import add_project_configs
from ssim_kd.reporting.runs import flatten
from tests.engine.test_arguments import cfg_of, data_file
from tests.helpers import full_config


def keys_of_ours() -> dict[str, Any]:
    """Our keys and their defaults."""

    def differences(ours: CfgNode, stock: CfgNode, prefix: str) -> dict[str, Any]:
        found = {}
        for key, value in ours.items():
            if isinstance(value, CfgNode):
                below = stock.get(key, CfgNode()) if stock else CfgNode()
                found.update(differences(value, below, f"{prefix}{key}."))
            elif key not in stock:
                found[prefix + key] = value
        return found

    return differences(full_config(), get_cfg(), "")


def other_values(folder: Path) -> dict[str, Any]:
    """A value for each key of ours that is not its default."""
    special = {
        "DATASETS.DATA_FILE": str(data_file(folder / "parts")),
        "DATASETS.REGISTER_COCO": [["mine", "mine.json", "images"]],
        "SOLVER.EPOCHS": 3.0,
        "TRACKING.WRITERS": [],
        "MODEL.DISTILL.TEACHER.NAME": "teacher.yaml",
        "MODEL.DISTILL.TEACHER.CONFIG_FILE": "teacher.yaml",
        "MODEL.DISTILL.TEACHER.EXPECTED_AP": 0.0,
        "MODEL.DISTILL.TERMS": [["SSIMDistiller"], ["LpDistiller", "LOSS_WEIGHT", 2.0]],
        "MODEL.DISTILL.LOSS_WEIGHT": 2.0,
        "MODEL.DISTILL.IN_FEATURES": ["p3"],
    }

    def other(value: Any) -> Any:
        if isinstance(value, bool):
            return not value
        if isinstance(value, int | float):
            return value + 1
        if isinstance(value, str) or value is None:
            return f"{value}x"
        return [other(part) for part in value] or [1]

    return {**{key: other(value) for key, value in keys_of_ours().items()}, **special}


def test_every_key_means_the_same_in_the_file_and_as_a_pair(tmp_path: Path) -> None:
    """What is computed from a key reads it after the overrides."""
    values = other_values(tmp_path)
    base = {
        "_BASE_": model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"),
        "DATASETS": {"DATA_FILE": str(data_file(tmp_path / "other", name="other"))},
        "MODEL": {"META_ARCHITECTURE": "DistilledDetector", "DEVICE": "cpu"},
    }
    plain = tmp_path / "plain.yaml"
    plain.write_text(yaml.safe_dump(base))
    assert len(values) > 60 and values.keys() == keys_of_ours().keys()
    # What counts iterations is scaled if a file says it, and stays as a pair.
    epochs = values.pop("SOLVER.EPOCHS")
    content = yaml.safe_load(plain.read_text())
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node = content
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    with_keys = tmp_path / "with_keys.yaml"
    with_keys.write_text(yaml.safe_dump(content))
    by_file, _ = cfg_of("--config-file", with_keys)
    pairs = [part for pair in values.items() for part in pair]
    by_pair, _ = cfg_of("--config-file", plain, *pairs)
    assert by_pair.DATASETS.TRAIN == ("parts_train",)
    assert dict(flatten(by_pair)) == dict(flatten(by_file))
    by_pair, _ = cfg_of("--config-file", plain, "SOLVER.EPOCHS", epochs)
    with_keys.write_text(yaml.safe_dump({**base, "SOLVER": {"EPOCHS": epochs}}))
    assert cfg_of("--config-file", with_keys)[0] == by_pair


def test_a_pair_wins_over_what_an_argument_sets(tmp_path: Path) -> None:
    ours, other = (str(data_file(tmp_path / name, name=name)) for name in ("ours", "other"))
    line = ("--config-file", "COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    cfg, _ = cfg_of(*line, "--data", ours, "DATASETS.DATA_FILE", other)
    assert cfg.DATASETS.TRAIN == ("other_train",)
    cfg, _ = cfg_of(*line, "--data", ours, "DATASETS.TEST", "('ours_train',)")
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("ours_train",), ("ours_train",))
    cfg, _ = cfg_of(*line, "--data", ours, "MODEL.RETINANET.NUM_CLASSES", 3)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 3
    teacher = ("--teacher", "COCO-Detection/retinanet_R_101_FPN_3x.yaml")
    node = "MODEL.DISTILL.TEACHER"
    cfg, _ = cfg_of(*line, *teacher, f"{node}.WEIGHTS", "mine.pth", f"{node}.OPTS", "['A', 1]")
    assert (cfg.MODEL.DISTILL.TEACHER.WEIGHTS, cfg.MODEL.DISTILL.TEACHER.OPTS) == (
        "mine.pth",
        ["A", 1],
    )
    cfg, _ = cfg_of(*line, *teacher, "MODEL.DISTILL.ENABLED", "False")
    assert not cfg.MODEL.DISTILL.ENABLED
    cfg, _ = cfg_of(*line, *teacher, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    assert cfg.MODEL.META_ARCHITECTURE == "DistilledDetector"
    assert cfg.MODEL.DISTILL.STUDENT_META_ARCHITECTURE == "GeneralizedRCNN"


def test_a_weight_of_a_file_gives_way_to_auto_and_back(tmp_path: Path) -> None:
    key = "MODEL.DISTILL.LOSS_WEIGHT"
    for in_file, pair in ((500.0, "auto"), ("auto", 500.0)):
        (tmp_path / "mine.yaml").write_text(f"MODEL: {{DISTILL: {{LOSS_WEIGHT: {in_file}}}}}")
        for pairs, expected in (((), in_file), ((key, pair), pair)):
            cfg, _ = cfg_of("--config-file", tmp_path / "mine.yaml", *pairs)
            assert expected == cfg.MODEL.DISTILL.LOSS_WEIGHT


def test_a_warmup_of_the_users_own_file_stays(tmp_path: Path) -> None:
    zoo = model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    line = ("--data", data_file(tmp_path / "parts"), "--epochs", 90, "--batch", 4)  # 180 iterations
    for solver, warmup in (
        ("WARMUP_ITERS: 100", 100),
        # It belongs to 20,000 iterations.
        ("WARMUP_ITERS: 100, MAX_ITER: 20000, STEPS: [15000]", 45),
        ("WARMUP_ITERS: 20, MAX_ITER: 20000, STEPS: [15000]", 20),
        ("GAMMA: 0.1", 45),
    ):
        (tmp_path / "mine.yaml").write_text(f"_BASE_: {zoo}\nSOLVER: {{{solver}}}\n")
        cfg, _ = cfg_of("--config-file", tmp_path / "mine.yaml", *line)
        assert (180, warmup) == (cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS)


def test_classes_of_a_file_of_the_zoo_are_those_of_the_data(tmp_path: Path) -> None:
    """Cityscapes' config has 8, which is not the user's to leave out."""
    path = data_file(tmp_path / "parts")
    cfg, _ = cfg_of("--config-file", "Cityscapes/mask_rcnn_R_50_FPN.yaml", "--data", path)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3


def test_load_config_reads_its_arguments_only(tmp_path: Path) -> None:
    line = ["--config-file", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "--epochs", "2"]
    args = argument_parser().parse_args([*line, "--data", str(data_file(tmp_path / "parts"))])
    before = vars(args).copy()
    cfg = load_config(args, add_project_configs)
    assert vars(args) == before and load_config(args, add_project_configs) == cfg


def test_the_data_are_left_alone_until_all_processes_read_them(tmp_path: Path) -> None:
    path = data_file(tmp_path / "parts")
    (path.parent / "train.json").unlink()
    for suffix, load in ((".yaml", load_yaml), (".py", load_lazy)):
        line = ["--config-file", f"COCO-Detection/retinanet_R_50_FPN_1x{suffix}", "--epochs", "40"]
        args = argument_parser().parse_args([*line, "--data", str(path)])
        load(args, data=False)
        with pytest.raises(ValueError, match=r"train\.json"):
            load(args)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("COCO-Detection/ssim_retinanet_R50_FPN_1x.yaml", "ssim_retinanet_R_50_FPN_1x.yaml"),
        ("COCO-Detection/faster_rcnn_R101_FPN_3x.yaml", "faster_rcnn_R_101_FPN_3x.yaml"),
        ("new_baselines/mask_rcnn_R_50_FPN_100_LSJ.py", "mask_rcnn_R_50_FPN_100ep_LSJ.py"),
        ("nothing/like/this.py", ""),
    ],
)
def test_a_config_that_is_not_there_is_answered_with_near_names(name: str, near: str) -> None:
    load = load_lazy if name.endswith(".py") else load_yaml
    with pytest.raises(ValueError, match="--config-file") as caught:
        load(argument_parser().parse_args(["--config-file", name]))
    assert name in str(caught.value) and near in str(caught.value)
    assert ("did you mean" in str(caught.value)) == bool(near)


# --- LazyConfigs ---

ZOO = [
    ("COCO-Detection/retinanet_R_50_FPN_1x.py", "model.num_classes"),
    ("COCO-Detection/fcos_R_50_FPN_1x.py", "model.num_classes"),
    ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py", "model.roi_heads.num_classes"),
    ("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.py", "model.roi_heads.num_classes"),
    ("Misc/mmdet_mask_rcnn_R_50_FPN_1x.py", ""),
    ("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py", "model.roi_heads.num_classes"),
    ("common/models/cascade_rcnn.py", "model.roi_heads.num_classes"),
]


def lazy(*arguments: Any) -> Loaded:
    return load_lazy(argument_parser().parse_args([str(a) for a in arguments]))


def counts(node: Any) -> list[int]:
    """The class counts of a model, wherever they are."""
    if OmegaConf.is_dict(node):
        own = [node.num_classes] if "num_classes" in node else []
        return own + [n for key in node for n in counts(node[key])]
    return [n for part in node for n in counts(part)] if OmegaConf.is_list(node) else []


@pytest.mark.parametrize(("name", "key"), ZOO)
@pytest.mark.parametrize("teacher", ["", "new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py"])
def test_data_of_a_lazy_config(name: str, key: str, teacher: str, tmp_path: Path) -> None:
    path = data_file(tmp_path / "parts")
    line = ("--config-file", name, "--data", path, *(("--teacher", teacher) if teacher else ()))
    if name.startswith("common"):
        own = tmp_path / "own.py"
        own.write_text(
            "from detectron2 import model_zoo\n"
            "_base = model_zoo.get_config('COCO-Detection/fcos_R_50_FPN_1x.py')\n"
            "dataloader, train = _base.dataloader, _base.train\n"
            "optimizer, lr_multiplier = _base.optimizer, _base.lr_multiplier\n"
            f"model = model_zoo.get_config({name!r}).model\n"
        )
        line = ("--config-file", own, *line[2:])
    if not key:
        with pytest.raises(ValueError, match=r"model\.num_classes") as caught:
            lazy(*line)
        assert "dataloader.train.dataset.names" in str(caught.value)
        return
    loaded = lazy(*line, "--epochs", 40, "--batch", 4)
    cfg = loaded.cfg
    model = cfg.model.student if teacher else cfg.model
    found = counts(model)
    assert len(found) > 1 and set(found) == {3}
    assert cfg.dataloader.train.dataset.names == "parts_train"
    assert cfg.dataloader.test.dataset.names == cfg.dataloader.evaluator.dataset_name == "parts_val"
    assert (cfg.train.max_iter, cfg.dataloader.train.total_batch_size) == (80, 4)
    assert len(DatasetCatalog.get("parts_train")) == 8
    assert any("3" in note and "parts_train" in note for note in loaded.notes)
    assert any("8 images" in note and "train.max_iter 80" in note for note in loaded.notes)
    # Overrides win.
    opts = ("dataloader.test.dataset.names=parts_train", f"{key}=5", "train.max_iter=7")
    cfg = lazy(*line, "--epochs", 40, *opts).cfg
    assert cfg.train.max_iter == 7 and 5 in counts(cfg.model.student if teacher else cfg.model)
    assert cfg.dataloader.evaluator.dataset_name == "parts_train"


INTERPOLATED = """
from detectron2 import model_zoo
_base = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
model, dataloader, train = _base.model, _base.dataloader, _base.train
optimizer, lr_multiplier = _base.optimizer, _base.lr_multiplier
dataloader.classes = 10
"""


@pytest.mark.parametrize(
    "line",
    [
        'model.num_classes = "${dataloader.classes}"',
        'model.num_classes = "${..dataloader.classes}"',
        'model.num_classes = 10\nmodel.head.num_classes = "${model.num_classes}"',
        'model.num_classes = 10\nmodel.head.num_classes = "${...dataloader.classes}"',
        'model.num_classes = 10\ntrain.seed = "${model.num_classes}"',
    ],
)
def test_teacher_of_a_lazy_config_with_interpolations(line: str, tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text(INTERPOLATED + line + "\n")
    given = ("--config-file", config)
    plain = lazy(*given).cfg
    cfg = lazy(*given, "--teacher", "COCO-Detection/retinanet_R_101_FPN_3x.yaml").cfg
    assert counts(cfg.model.student) == counts(plain.model) == [10, 10]
    assert cfg.train.get("seed") == plain.train.get("seed")
    assert cfg.dataloader.evaluator.dataset_name == "coco_2017_val"
    cfg = lazy(*given, "--teacher", "x.yaml", "train.max_iter=5").cfg
    assert cfg.model.max_iter == 5
