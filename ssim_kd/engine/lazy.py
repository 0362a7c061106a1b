"""Training and evaluation of a LazyConfig (.py), as Detectron2's lazyconfig_train_net.py does.

The config has Detectron2's own parts: ``model``, ``optimizer``, ``lr_multiplier``, ``dataloader``
and ``train``. Distillation is a matter of ``model``::

    model = L(DistilledDetector)(
        student=student,                                  # any model of the zoo's LazyConfigs
        teacher=L(FrozenTeacher.load_from)(name="new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py"),
        distillers=[L(SSIMDistiller)(weight=4.0)],
        max_iter="${..train.max_iter}",
    )

``--teacher`` puts the same around a plain model. ``train`` takes the settings of :data:`KEYS`,
which Detectron2 does not have, and ``train.writers`` further writers:
``[L(MLflowWriter)(folder="${train.output_dir}")]``.
"""

import argparse
import copy
import functools
import itertools
import logging
import os
from collections.abc import Callable, Mapping
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

from ..checkpoint import FINAL, StudentCheckpointer, load_strictly, read_weights
from ..config import add_notes
from ..data import (
    EvaluationLoader,
    Needs,
    build_train_loader,
    check_datasets,
    class_names,
    train_records,
)
from ..modeling import DistilledDetector, FrozenTeacher, load_detector
from ..modeling.teacher_config import source_of
from ..sharing import without_queries
from .coco_evaluation import ScoredCOCOEvaluator
from .config_loading import load_lazy
from .evaluation import set_up_evaluation, set_up_training
from .optimizer import add_groups
from .preflight import check_class_count, check_scored
from .settings import Settings
from .trackers import TrackerWriter
from .training import Training

logger = logging.getLogger(__name__)

#: The keys of the settings of a training. Those that Detectron2 does not have may be left out:
#: :class:`Settings` has what they do, and their defaults.
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


class LazyRecipe:
    """The parts of a training or an evaluation, from the command line of a LazyConfig."""

    keys = KEYS

    def __init__(self, args: argparse.Namespace, facts: dict[str, int] | None = None) -> None:
        """
        Args:
            args: of :func:`ssim_kd.engine.argument_parser`.
            facts: of :func:`load_lazy`, from another process.
        """
        loaded = load_lazy(args, facts)
        self.cfg, self.notes, self.facts = loaded.cfg, loaded.notes, loaded.facts
        # What Detectron2's default_setup opens.
        self._args = argparse.Namespace(**{**vars(args), "config_file": loaded.config_file})
        self.device, self.folder = self.cfg.train.device, self.cfg.train.output_dir
        self.text = str(OmegaConf.to_container(self.cfg))
        names = [OmegaConf.select(self.cfg, f"model.teacher.{k}") for k in ("name", "weights")]
        self.teacher_names = [name for name in names if isinstance(name, str)]
        teacher = self.cfg.model.get("teacher")
        if _calls(teacher, FrozenTeacher.load_from) and not teacher.get("image_format"):
            # It is given what the loader reads.
            image_format = _value(self.cfg, KEYS["image_format"])
            if image_format:
                teacher.image_format = image_format

    def settings(self) -> Settings:
        """The plain values."""
        get = functools.partial(_value, self.cfg)
        return Settings.read(get, KEYS, _NAMES, language="LazyConfig")

    def set_up(self) -> None:
        """Logs, the seed, a copy of the config."""
        set_up_training(self.cfg, self._args, self.folder)
        for note in self.notes:
            logger.info("%s", note)

    def check(self) -> None:
        """Check the schedule and the data sets."""
        # For a parameter of no model.
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        try:
            self._scheduler(optimizer)
        except Exception as error:
            raise ValueError(
                f"lr_multiplier: the schedule of the learning rate cannot be built: {error}. "
                "Expected a ParamScheduler of fvcore, e.g. detectron2.solver.WarmupParamScheduler."
            ) from error
        needs = self._needs()
        summaries = check_datasets(
            needs,
            train=True,
            own_loader=not needs.train,
            own_evaluator=not _calls(self.cfg.dataloader.get("evaluator"), COCOEvaluator),
        )
        for summary in summaries:
            logger.info("%s", summary)
        self._classes = class_names(summaries)
        check_scored(self.settings(), needs, summaries)

    def _needs(self) -> Needs:
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
        add_notes(path, FINAL, self._classes)

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
        node.params.model = model
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
            scheduler=self._scheduler(optimizer),
            evaluate=lambda: self._evaluate(student),
            statistics_loader=lambda: self._train_loader(num_workers=0),
            pictures=lambda: self.pictures(3),
            trackers=lambda: build_trackers(cfg),
            config=OmegaConf.to_container(self.cfg),  # type: ignore[arg-type]
        )

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> LRMultiplier:
        multiplier = instantiate(self.cfg.lr_multiplier)
        return LRMultiplier(optimizer, multiplier, self.cfg.train.max_iter)

    def _train_loader(self, **options: Any) -> Any:
        """Ours for Detectron2's, with the same arguments; any other as it is."""
        node = copy.deepcopy(self.cfg.dataloader.train)
        node.update(options)
        if _calls(node.get("dataset"), get_detection_dataset_dicts):
            # Boxes of zero area, of which COCO has two, give losses that are not finite.
            node.dataset["_target_"] = functools.partial(train_records, needs=self._needs())
        if _calls(node, build_detection_train_loader) and self._is_exact(node):
            node["_target_"] = functools.partial(build_train_loader, needs=self._needs())
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

    def _evaluate(self, model: nn.Module, test: DictConfig | None = None) -> Mapping[str, Any]:
        if "evaluator" not in self.cfg.dataloader:
            return {}
        loader = self._test_loader(test)
        results = inference_on_dataset(model, loader, self._evaluator())
        print_csv_format(results)
        return results

    def _evaluator(self) -> Any:
        node = copy.deepcopy(self.cfg.dataloader.evaluator)
        if _calls(node, COCOEvaluator):
            # The same, for annotations with any id.
            node["_target_"] = ScoredCOCOEvaluator
        return instantiate(node)

    def _test_loader(self, node: DictConfig | None = None) -> Any:
        loader = instantiate(node or self.cfg.dataloader.test)
        # No SIGTERM ends its workers.
        return EvaluationLoader(loader) if isinstance(loader, DataLoader) else loader

    def check_evaluation(self, training: Training) -> None:
        """Build the evaluator and its loader; check what the built student predicts."""
        key = "dataloader.train.dataset.names"
        check_class_count(training.student, self._classes, key=key)
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

    def evaluate_teacher(self) -> Mapping[str, Any]:
        """Evaluate the teacher on the student's data."""
        return self._teacher_evaluation()()

    def _teacher_evaluation(self) -> Callable[[], Mapping[str, Any]]:
        """Build the whole teacher; returns what evaluates it, at the student's image size."""
        source = self._teacher()
        found, _ = load_detector(source)
        model: Any = found.to(self.device)
        test = copy.deepcopy(self.cfg.dataloader.test)
        if "mapper" in test:
            test.mapper.image_format = (
                source.input_format or getattr(model, "input_format", None) or "BGR"
            )
        return lambda: self._evaluate(model, test)

    def evaluation(self) -> Callable[[], Any]:
        """Build what ``--eval-only`` or ``--eval-teacher`` evaluates; returns what does so."""
        cfg, args = self.cfg, self._args
        seed = cfg.train.get("seed", -1)
        set_up_evaluation(self.folder, args, OmegaConf.to_yaml(cfg.train), seed=seed)
        if args.eval_teacher:
            return self._teacher_evaluation()
        # The student alone, whose weights must fit to the last key.
        model: nn.Module = instantiate(cfg.model.get("student", cfg.model)).to(self.device)
        path = cfg.train.init_checkpoint
        if args.resume:
            path = StudentCheckpointer(model, self.folder).newest() or path
        load_strictly(model, read_weights(path, key=KEYS["weights"]))
        return lambda: self._evaluate(model)


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
