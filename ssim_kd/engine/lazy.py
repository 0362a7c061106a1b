"""Training and evaluation of a LazyConfig (.py), as Detectron2's lazyconfig_train_net.py does.

The config has Detectron2's own parts: ``model``, ``optimizer``, ``lr_multiplier``, ``dataloader``
and ``train``. Distillation is a matter of ``model``::

    model = L(DistilledDetector)(
        student=student,                                  # any model of the zoo's LazyConfigs
        teacher=L(FrozenTeacher.load_from)(name="new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py"),
        distillers=[L(SSIMDistiller)(weight=4.0)],
        max_iter="${..train.max_iter}",
    )

``--teacher`` puts the same around a plain model. ``train`` takes the settings of
:data:`ssim_kd.config_loading.lazy_config.KEYS`, some of which Detectron2 does not have, and
``train.writers`` further writers:
``[L(MLflowWriter)(folder="${train.output_dir}")]``.
"""

import argparse
import copy
import functools
import itertools
import os
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import build_detection_train_loader, get_detection_dataset_dicts
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from ..checkpoint import FINAL
from ..config import add_notes
from ..config_loading import load_lazy
from ..config_loading.lazy_config import KEYS
from ..data import (
    EvaluationLoader,
    Needs,
    build_train_loader,
    train_records,
)
from ..modeling import DistilledDetector, FrozenTeacher, unwrap
from ..modeling.map_rank import log_ranks
from ..modeling.teacher_config import source_of
from ..sharing import without_queries
from ..trackers import TrackerWriter
from .coco_evaluation import ScoredCOCOEvaluator
from .evaluation import load_for_evaluation
from .optimizer import add_groups
from .preflight import check_class_count
from .recipe import ConfigRecipe
from .settings import Settings, as_text
from .training import Training

_NAMES = {
    "teacher": "model.teacher",
    "teacher_weights": "model.teacher.weights",
    "loader": "dataloader.train",
}
# What :class:`ssim_kd.data.Needs` calls otherwise.
_DATA_KEYS = {
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TEST": "dataloader.test.dataset.names",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "INPUT.MASK_FORMAT": "dataloader.train.mapper.instance_mask_format",
}


class LazyRecipe(ConfigRecipe):
    """The parts of a training or an evaluation, from the command line of a LazyConfig."""

    keys = KEYS
    advice = "Expected lr_multiplier a ParamScheduler of fvcore, e.g. WarmupParamScheduler."

    def __init__(self, args: argparse.Namespace, *, data: bool = True) -> None:
        """
        Args:
            args: of :func:`ssim_kd.engine.argument_parser`.
            data: see :func:`load_lazy`.
        """
        loaded = load_lazy(args, data=data)
        super().__init__(args, loaded)
        cfg: DictConfig = loaded.cfg
        self.device, self.folder = cfg.train.device, cfg.train.output_dir
        names = [OmegaConf.select(cfg, f"model.teacher.{k}") for k in ("name", "weights")]
        self.teacher_names = [name for name in names if isinstance(name, str)]
        teacher = cfg.model.get("teacher")
        if _calls(teacher, FrozenTeacher.load_from) and not teacher.get("image_format"):
            # It is given what the loader reads.
            image_format = _value(cfg, KEYS["image_format"])
            if image_format:
                teacher.image_format = image_format
        self.text = as_text(OmegaConf.to_container(cfg))  # type: ignore[arg-type]
        self.own = {
            "own_loader": not self.needs().train,
            "own_evaluator": not _calls(cfg.dataloader.get("evaluator"), COCOEvaluator),
        }

    def settings(self) -> Settings:
        """The plain values."""
        get = functools.partial(_value, self.cfg)
        more = {"language": "LazyConfig", "test_sets": self.needs().test}
        return Settings.read(get, KEYS, _NAMES, **more)

    def needs(self) -> Needs:
        """What is known of the data sets, and of what the student and its mapper read of them."""
        data = self.cfg.dataloader

        def names(loader: str) -> tuple[str, ...]:
            found = OmegaConf.select(data, f"{loader}.dataset.names") or ()
            return (found,) if isinstance(found, str) else tuple(found)

        student = self.cfg.model.get("student", self.cfg.model)
        heads = student.get("roi_heads") or {}
        count = _value(student, "roi_heads.num_classes" if heads else "num_classes")
        mapper = (data.get("train") or {}).get("mapper") or {}
        found: dict[str, Any] = {
            "masks": bool(heads.get("mask_head")) and bool(mapper.get("use_instance_mask")),
            "mask_format": mapper.get("instance_mask_format", "polygon"),
            "keypoints": _value(student, "roi_heads.keypoint_head.num_keypoints") or 0,
            "filter_empty": _value(data, "train.dataset.filter_empty") is not False,
        }
        return Needs(
            train=names("train"),
            test=names("test"),
            num_classes=count if isinstance(count, int) else None,
            num_classes_key="model.roi_heads.num_classes" if heads else "model.num_classes",
            zero_area="drop",
            keys=_DATA_KEYS,
            **found,
        )

    def write_student(self, path: str) -> None:
        """A config of the student that stock Detectron2 reads."""
        cfg = copy.deepcopy(self.cfg)
        if "student" in cfg.model:
            # Moved up: what names others by their place would name none.
            OmegaConf.resolve(cfg)
            cfg.model = cfg.model.student
        cfg.train.init_checkpoint = FINAL
        LazyConfig.save(without_queries(cfg), path)
        add_notes(path, FINAL, self.classes)

    def model(self) -> nn.Module:
        """What is trained."""
        return instantiate(self.cfg.model).to(self.device)  # type: ignore[no-any-return]

    def training(self) -> Training:
        """Build all parts; config.yaml gets what is the method's own."""
        cfg, model = self.cfg, self.model()
        if isinstance(model, DistilledDetector) and model.distillers:
            distillers = model.distillers.values()
            for node, distiller in zip(cfg.model.distillers, distillers, strict=True):
                for argument, value in distiller.own.items():
                    OmegaConf.update(node, argument, value, force_add=True)
            if comm.is_main_process():
                LazyConfig.save(without_queries(cfg), os.path.join(self.folder, "config.yaml"))
        node = copy.deepcopy(cfg.optimizer)
        node.params.model = unwrap(model)  # rules by name see the plain student's
        main = instantiate(node)
        settings = self.settings()
        base_lr = main.defaults["lr"]
        optimizer = add_groups(main, model, base_lr=base_lr, max_iter=settings.max_iter)
        student = getattr(model, "student", model)
        return Training(
            settings=settings,
            model=model,
            loader=self._train_loader(),
            optimizer=optimizer,
            scheduler=self.scheduler(optimizer),
            evaluate=lambda: self.evaluate(student),
            statistics_loader=lambda: self._train_loader(num_workers=0),
            pictures=lambda: self.pictures(3),
            trackers=lambda: build_trackers(cfg),
            config=OmegaConf.to_container(cfg),  # type: ignore[arg-type]
        )

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LRMultiplier:
        """The schedule of the learning rate."""
        multiplier = instantiate(self.cfg.lr_multiplier)
        return LRMultiplier(optimizer, multiplier, self.cfg.train.max_iter)

    def _train_loader(self, **options: Any) -> Any:
        """Ours for Detectron2's, with the same arguments; any other as it is."""
        node = copy.deepcopy(self.cfg.dataloader.train)
        node.update(options)
        if _calls(node.get("dataset"), get_detection_dataset_dicts):
            # Boxes of zero area, of which COCO has two, give losses that are not finite.
            node.dataset["_target_"] = functools.partial(train_records, needs=self.needs())
        if _calls(node, build_detection_train_loader) and self._is_exact(node):
            node["_target_"] = functools.partial(build_train_loader, needs=self.needs())
            node.seed = None if self.settings().seed < 0 else self.settings().seed
        return instantiate(node)

    def _is_exact(self, node: DictConfig) -> bool:
        """Whether our loader can compute the order of images ahead; makes the data set of it."""
        sampler = _target(node.get("sampler"))
        if sampler is not None and not sampler.__module__.startswith("detectron2."):
            return False
        dataset = instantiate(node.dataset)
        if _target(node.dataset) is not None:
            # The loader takes this one: a set that code registers can be slow to make.
            node.dataset["_target_"] = lambda **arguments: dataset
        return hasattr(dataset, "__getitem__")

    def evaluate(self, model: nn.Module, test: DictConfig | None = None) -> Mapping[str, Any]:
        """Evaluate on the set of ``dataloader.test``, if there is an evaluator.

        Args:
            model: the student, or the teacher.
            test: instead of ``dataloader.test``.
        """
        if "evaluator" not in self.cfg.dataloader:
            return {}
        loader = self._test_loader(test)
        results = inference_on_dataset(model, loader, self._evaluator())
        print_csv_format(results)
        return results

    def _evaluator(self) -> Any:
        node = copy.deepcopy(self.cfg.dataloader.evaluator)
        if _calls(node, COCOEvaluator):
            # The same, for annotations with any id; a report shows the detections.
            node["_target_"] = ScoredCOCOEvaluator
            node.setdefault("output_dir", os.path.join(self.folder, "inference"))
        return instantiate(node)

    def _test_loader(self, node: DictConfig | None = None) -> Any:
        loader = instantiate(node or self.cfg.dataloader.test)
        # No SIGTERM ends its workers.
        return EvaluationLoader(loader) if isinstance(loader, DataLoader) else loader

    def check_evaluation(self, training: Training) -> None:
        """Build the evaluator and its loader; check what the built student predicts."""
        key = "dataloader.train.dataset.names"
        check_class_count(training.student, self.classes, key=key)
        if "evaluator" not in self.cfg.dataloader:
            return
        for key, build in (("test", self._test_loader), ("evaluator", self._evaluator)):
            try:
                build()
            except Exception as error:
                raise ValueError(
                    f"dataloader.{key} cannot be built: {type(error).__name__}: {error}"
                ) from error

    def pictures(self, count: int) -> list[dict[str, Any]]:
        """The first images that are evaluated, as the model takes them."""
        loader = self._test_loader()
        return list(itertools.islice(itertools.chain.from_iterable(loader), count))

    def teacher_weights(self) -> str:
        """The file of the teacher's weights."""
        node = self.cfg.model.teacher
        return self._teacher().weights if _calls(node, FrozenTeacher.load_from) else ""

    def _teacher(self) -> Any:
        """What is found of the teacher."""
        node = self.cfg.model.get("teacher")
        if not _calls(node, FrozenTeacher.load_from):
            raise ValueError(
                f"model.teacher is {node}; expected a call of FrozenTeacher.load_from, as "
                "--teacher makes it, for a teacher that is evaluated."
            )
        return source_of(node.name, node.get("weights", ""), list(node.get("opts", ())))

    def detector(self, *, teacher: bool) -> tuple[nn.Module, DictConfig]:
        """What is evaluated: only the student, or the whole teacher at the student's image size.

        Raises:
            ValueError: weights that do not fit to the last key.
        """
        cfg, test = self.cfg, copy.deepcopy(self.cfg.dataloader.test)
        if not teacher:
            student = instantiate(cfg.model.get("student", cfg.model)).to(self.device)
            path = cfg.train.init_checkpoint
            load_for_evaluation(
                student, path, key=KEYS["weights"], folder=self.args.resume and self.folder
            )
            return student, test
        source = self._teacher()
        model: Any = source.load()[0]
        log_ranks(model)
        if "mapper" in test:
            test.mapper.image_format = (
                source.input_format or getattr(model, "input_format", None) or "BGR"
            )
        return model.to(self.device), test


def build_trackers(cfg: DictConfig) -> list[EventWriter]:
    """The writers of ``train.writers``; the parameters of those of trackers are the config."""
    writers = list(instantiate(cfg.train.get("writers", [])))
    for writer in writers:
        if isinstance(writer, TrackerWriter) and not writer.params:
            writer.params = OmegaConf.to_container(cfg)
    return writers


def _value(cfg: DictConfig, key: str) -> Any:
    """The value of a dotted key, plain; None if it is not set."""
    value = OmegaConf.select(cfg, key)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _target(node: Any) -> Any:
    """What a node calls; None for a node that is not a call."""
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    return locate(target) if isinstance(target, str) else target


def _calls(node: Any, function: Any) -> bool:
    # Class methods are other objects each time, and equal.
    return _target(node) == function
