"""From the command line of a LazyConfig to the config: file, arguments, overrides."""

import argparse
import os
import traceback
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.config import LazyCall as L
from detectron2.data import get_detection_dataset_dicts
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..command_line import is_evaluation
from ..config import import_method
from ..config_files import Loaded, beside, did_you_mean, find_file, lacks_gpu, load_lazy_file
from ..data import register_coco, train_records
from ..modeling import DISTILLER_REGISTRY, DistilledDetector, FrozenTeacher, SSIMDistiller
from ..modeling.saved_lazy import name_functions
from .data_file import read_data_file
from .schedule import ConfigSchedule, Schedule, below, value_of

#: The keys of the settings of a training. Those that Detectron2 does not have may be left out:
#: :class:`ssim_kd.engine.settings.Settings` has what they do, and their defaults.
KEYS = {
    "output_dir": "train.output_dir",
    "max_iter": "train.max_iter",
    "seed": "train.seed",
    "weights": "train.init_checkpoint",
    "weights_partial": "train.weights_partial",
    "amp": "train.amp.enabled",
    "accumulate": "train.accumulate",
    "max_skipped_steps": "train.max_skipped_steps",
    "grace_period": "train.grace_period",
    "checkpoint_period": "train.checkpointer.period",
    "checkpoints_to_keep": "train.checkpointer.max_to_keep",
    "eval_period": "train.eval_period",
    "log_period": "train.log_period",
    "image_format": "dataloader.train.mapper.image_format",
    "vis_period": "train.vis_period",
    "precise_bn": "train.precise_bn",
    "expected_ap": "train.expected_ap",
    "report": "train.report",
    "ddp": "train.ddp",
}
# By these names or itself, of which ours reads a file once.
_DETECTRON2_RECORDS = (
    get_detection_dataset_dicts,
    "detectron2.data.get_detection_dataset_dicts",
    "detectron2.data.build.get_detection_dataset_dicts",
)
# Overrides of what --teacher puts around the student.
_WRAPPING = ("model.student", "model.teacher", "model.distillers")
# Schedulers that count in shares of the training.
_RELATIVE = ("fvcore.common.param_scheduler.", "detectron2.solver.")


def load_lazy(args: argparse.Namespace, *, data: bool = True) -> Loaded:
    """Read a LazyConfig, and apply the overrides ("key=value") and the arguments.

    Overrides of ``model`` mean the student where ``--teacher`` wraps it, and are applied before.

    Args:
        args, data: see :func:`load_yaml`.

    Raises:
        ValueError: the file cannot be read, lacks a part, or an override does not fit.
    """
    notes: list[str] = []
    for name in getattr(args, "imports", ()):
        import_method(name)
    config_file = find_file(args.config_file)
    inside = [text for text in args.opts if not text.lstrip("+~").startswith(_WRAPPING)]
    by_hand = {text.lstrip("+~").partition("=")[0] for text in args.opts}
    cfg = _with_overrides(_read(config_file), inside)
    trains = not is_evaluation(args)
    needed = ["model", "dataloader", "train", *(["optimizer", "lr_multiplier"] if trains else [])]
    missing = [key for key in needed if key not in cfg]
    if missing:
        raise ValueError(f"--config-file {config_file} lacks {missing}.")
    if getattr(args, "data", "") and data:
        path = beside(os.path.expanduser(args.data), config_file)
        notes += apply_lazy_data(cfg, path, by_hand)
    if data and trains:
        notes += LazySchedule(cfg).apply(
            epochs=getattr(args, "epochs", None),
            batch=getattr(args, "batch", None),
            by_hand=by_hand,
            count_images=lambda: _count_lazy_images(cfg),
        )
        kept = KEYS["checkpoints_to_keep"]
        if getattr(args, "epochs", None) and kept not in by_hand and value_of(cfg, kept) == 100:
            # Detectron2's default. Each is an epoch now, and of an R-50 0.3 GB.
            OmegaConf.update(cfg, kept, 2)
            notes.append(f"{kept} 2: the newest checkpoints that stay, next to the best.")
    if getattr(args, "teacher", ""):
        if "student" not in cfg.model:
            # In a deeper place, what names others by their place would name none.
            OmegaConf.resolve(cfg)
        cfg.model = _distilled(cfg.model, args.teacher)
    outside = [text for text in args.opts if text not in inside]
    cfg = _with_overrides(cfg, outside)
    for node in cfg.model.get("distillers") or ():
        if node.get("_target_") in DISTILLER_REGISTRY:
            node["_target_"] = DISTILLER_REGISTRY.get(node["_target_"])
    cfg.train.output_dir = os.path.expanduser(cfg.train.output_dir)
    name_functions(cfg)  # so that the folder of the run can be read
    if lacks_gpu(str(cfg.train.device)):
        cfg.train.device = "cpu"
        notes.append("This machine has no GPU that PyTorch can use: train.device is 'cpu'.")
    return Loaded(cfg, config_file, notes)


def _distilled(model: DictConfig, teacher: str) -> DictConfig:
    """A model that learns from a teacher: what it was, wrapped, if it learned from none."""
    if "student" not in model:
        model = L(DistilledDetector)(student=model, max_iter="${..train.max_iter}")
    if not model.get("distillers"):
        model.distillers = [L(SSIMDistiller)()]
    model.teacher = L(FrozenTeacher.load_from)(name=teacher)
    return model


def _count_lazy_images(cfg: DictConfig) -> int:
    try:
        node = cfg.dataloader.train.dataset
        if node.get("_target_") in _DETECTRON2_RECORDS:
            return len(train_records(**{key: node[key] for key in node if key != "_target_"}))
        return len(instantiate(node))
    except Exception as error:
        raise ValueError(
            "--epochs needs the number of images of dataloader.train.dataset, which cannot be "
            f"counted ({type(error).__name__}: {error}); expected a data set with a length, or "
            "train.max_iter instead of --epochs."
        ) from error


def _read(path: str) -> DictConfig:
    try:
        return load_lazy_file(path)
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        place = f", line {lines[-1]}" if lines else ""
        raise ValueError(
            f"--config-file {path}{place} cannot be read: {type(error).__name__}: {error}"
        ) from error


def _with_overrides(cfg: DictConfig, opts: list[str]) -> DictConfig:
    for text in opts:
        _check_key(cfg, text.partition("=")[0])
    try:
        return LazyConfig.apply_overrides(cfg, opts)
    except Exception as error:
        raise ValueError(
            f"The overrides {opts} do not fit the LazyConfig: {type(error).__name__}: {error}. "
            "Expected key=value."
        ) from error


def _check_key(cfg: DictConfig, key: str) -> None:
    """Refuse the key of an override that nothing reads. "+" adds one all the same."""
    if key.startswith("+") or key in KEYS.values() or key == "train.writers":
        return
    if key.startswith("MODEL."):
        raise ValueError(
            f"{key} is a key of YAML configs; expected keys of the LazyConfig. A method is "
            "model.distillers.0._target_=PKDDistiller, its options are model.distillers.0.NAME."
        )
    node: Any = cfg
    for name in key.split("."):
        part: Any = name
        if isinstance(node, ListConfig) and name.isdigit() and int(name) < len(node):
            part = int(name)
        elif not isinstance(node, DictConfig) or "_target_" in node or node is cfg.train.get("ddp"):
            return  # what is called takes arguments that the config may leave out
        elif part not in node:
            plain: Any = OmegaConf.to_container(cfg)
            meant = did_you_mean(plain, key, KEYS.values())
            raise ValueError(
                f"{key} is not a key of the LazyConfig.{meant} Expected one that it has, or "
                f"+{key}=... to add it."
            )
        if OmegaConf.is_missing(node, part) or OmegaConf.is_interpolation(node, part):
            return
        node = node[part]


def apply_lazy_data(cfg: DictConfig, path: str, by_hand: Collection[str]) -> list[str]:
    """Register the data sets of a data file, and set them and their classes in a LazyConfig.

    A LazyConfig is evaluated on one set: "val", else "test". The classes are those of the student:
    of ``model.roi_heads`` (R-CNNs, ViTDet), else of ``model`` (RetinaNet, FCOS), and of the heads
    below with as many classes. A teacher keeps those of its weights.

    Args:
        cfg: changed in place.
        path: of the file.
        by_hand: keys of overrides, which stay as they are.

    Returns:
        what was set, a line each.

    Raises:
        ValueError: see :func:`read_data_file`; or a LazyConfig with other parts than the zoo's.
    """
    data = read_data_file(path)
    register_coco(CfgNode({"DATASETS": {"REGISTER_COCO": list(data.entries.values())}}))
    loaders, names = cfg.dataloader, {"train": data.entries["train"][0]}
    if data.tests and "test" in loaders:
        names["test"] = data.tests[0]
    elif "evaluator" in loaders:
        del loaders.evaluator
    for split, name in names.items():
        key = f"dataloader.{split}.dataset.names"
        if OmegaConf.select(cfg, key) is None:
            raise ValueError(
                f"--data {path}: the LazyConfig has no {key}; expected it there, as in the model "
                "zoo. Register the sets and name them in the .py file instead."
            )
        if key not in by_hand:
            OmegaConf.update(cfg, key, name)
    evaluator: Any = loaders.get("evaluator") or {}
    if "dataset_name" in evaluator and "dataloader.evaluator.dataset_name" not in by_hand:
        evaluator.dataset_name = "${..test.dataset.names}"
    place = "model.student" if "student" in cfg.model else "model"
    if OmegaConf.select(cfg, f"{place}.num_classes") is None:
        place += ".roi_heads"
    key, node = f"{place}.num_classes", OmegaConf.select(cfg, place)
    if OmegaConf.select(cfg, key) is None:
        raise ValueError(
            f"--data {path}: the LazyConfig has neither model.num_classes nor {key}; expected a "
            "detector like those of the model zoo. Register the sets, name them in "
            "dataloader.train.dataset.names and dataloader.test.dataset.names, and set the "
            f"{data.classes} classes of the model in the .py file instead."
        )
    if key not in by_hand:
        _replace_classes(node, node.num_classes, data.classes)
    shown = names.get("test", "no set to evaluate on")
    left = [f"; dataloader.test.dataset.names={name} evaluates on it" for name in data.tests[1:]]
    return [f"--data {path}: {key} {node.num_classes}, {names['train']} and {shown}{''.join(left)}"]


def _replace_classes(node: Any, old: int, new: int) -> None:
    """Replace the class count of a model and of all parts of it that do not take it from there."""
    if isinstance(node, DictConfig):
        if not OmegaConf.is_interpolation(node, "num_classes") and node.get("num_classes") == old:
            node.num_classes = new
        for key in map(str, node):
            if not OmegaConf.is_interpolation(node, key):
                _replace_classes(node[key], old, new)
    elif isinstance(node, ListConfig):
        for part in node:
            _replace_classes(part, old, new)


class LazySchedule(ConfigSchedule):
    """The schedule in a LazyConfig, whose scheduler counts in shares of the training."""

    keys = {
        "batch": "dataloader.train.total_batch_size",
        "max_iter": "train.max_iter",
        "lr": "optimizer.lr",
        "warmup": "lr_multiplier.warmup_length",
        "checkpoint_period": "train.checkpointer.period",
        "eval_period": "train.eval_period",
    }

    def read(self) -> Schedule:
        """The schedule of the config.

        Raises:
            ValueError: it lacks a key, or has a scheduler that counts in no shares of the training.
        """
        self._check_scheduler()
        found = super().read()
        missing = [self.keys[name] for name in ("batch", "max_iter") if not getattr(found, name)]
        if missing:
            raise ValueError(
                f"--epochs and --batch read {', '.join(missing)}, which the LazyConfig lacks; "
                f"expected it there. Without the two set {self.keys['max_iter']} and what follows "
                "it."
            )
        return replace(found, warmup=round(found.warmup * found.max_iter))

    def write(self, schedule: Schedule, by_hand: Collection[str] = ()) -> None:
        """Set the keys of the config, but those that were set by hand."""
        # Shares of the length as it was.
        OmegaConf.resolve(self.cfg.lr_multiplier)
        share: Any = schedule.warmup / schedule.max_iter
        super().write(replace(schedule, warmup=share), by_hand)

    def counts(self) -> Iterator[tuple[str, Any, Any]]:
        """Of the calls in ``model.distillers``."""
        return below("model.distillers", value_of(self.cfg, "model.distillers"))

    def _check_scheduler(self) -> None:
        nodes = [self.cfg.lr_multiplier]
        while nodes:
            node = nodes.pop()
            parts = node.values() if isinstance(node, DictConfig) else node
            nodes += [part for part in parts if isinstance(part, DictConfig | ListConfig)]
            target = node.get("_target_") if isinstance(node, DictConfig) else None
            if target is None:
                continue
            name = target if isinstance(target, str) else f"{target.__module__}.{target.__name__}"
            if not name.startswith(_RELATIVE):
                raise ValueError(
                    f"lr_multiplier is made by {name}, whose arguments --epochs and --batch cannot "
                    "scale; expected a scheduler of fvcore.common.param_scheduler. Set "
                    f"{', '.join(self.keys.values())} and lr_multiplier instead."
                )
