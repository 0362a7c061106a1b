"""A training of a YAML config: Detectron2's DefaultTrainer, whose parts :class:`Training` takes."""

import argparse
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.utils import comm

from ..checkpoint import FINAL
from ..command_line import is_evaluation
from ..config import write_stock_config
from ..config_loading import AddConfig, load_yaml, scale_workers
from ..data import (
    EvaluationLoader,
    Needs,
    build_evaluation_loader,
    build_train_loader,
    register_datasets,
)
from ..modeling import DistilledDetector, resolved_config, teacher_source, unwrap
from ..sharing import without_queries
from ..trackers import build_trackers
from ..writing import write_atomically
from .evaluation import (
    build_evaluator,
    build_tta_model,
    check_teachers_classes,
    student_for_evaluation,
    teacher_for_evaluation,
    test_time_augmentation,
)
from .optimizer import build_optimizer
from .preflight import (
    KEYS,
    check_class_count,
    check_config,
    check_evaluation,
    check_tested,
    named,
    settings_of,
)
from .recipe import ConfigRecipe
from .settings import Settings
from .training import Training


class DistillTrainer(Training, DefaultTrainer):
    """Trains what ``cfg`` describes: a :class:`DistilledDetector` or any stock detector.

    Subclass it as you would DefaultTrainer: ``build_model``, ``build_optimizer``,
    ``build_lr_scheduler``, ``build_train_loader``, ``build_test_loader``, ``build_evaluator``,
    ``build_hooks``, ``build_writers`` and ``test`` are used as there. A training loader that is not
    a :class:`ssim_kd.data.TrainLoader` (Detectron2's own, for example) costs the exact resume: a
    warning says so.
    """

    def __init__(self, cfg: CfgNode) -> None:
        with named("SOLVER.REFERENCE_WORLD_SIZE, SOLVER.IMS_PER_BATCH"):
            cfg = scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        detector = unwrap(model)  # rules by name see the names of the plain student
        if isinstance(detector, DistilledDetector):
            cfg = resolved_config(cfg, list(detector.distillers.values()))
        self.cfg = cfg
        with named("SOLVER (the optimizer)"):
            optimizer = self.build_optimizer(cfg, detector)
        with named("DATASETS, DATALOADER or INPUT (the training loader)"):
            loader = self.build_train_loader(cfg)
        Training.__init__(
            self,
            settings=settings_of(cfg, loader=f"{type(self).__name__}.build_train_loader"),
            model=model,
            loader=loader,
            optimizer=optimizer,
            scheduler=self.build_lr_scheduler(cfg, optimizer),
            evaluate=lambda: self.test(cfg, self.model),
            evaluate_last=self._test_with_augmentation if cfg.TEST.AUG.ENABLED else None,
            statistics_loader=self._statistics_loader,
            pictures=lambda: first_images(cfg, 3),
            trackers=lambda: build_trackers(cfg),
            config=cfg,
        )

    def _statistics_loader(self) -> Any:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0  # as DefaultTrainer does
        return self.build_train_loader(cfg)

    def _test_with_augmentation(self) -> OrderedDict:
        return test_time_augmentation(self.cfg, self.student, self)

    def train(self) -> Any:
        """See :meth:`Training.train`; ``TEST.EXPECTED_RESULTS`` are compared.

        Raises:
            SystemExit: they are not reached.
        """
        results = super().train()
        if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
            verify_results(self.cfg, results)
        return results

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        """See :func:`ssim_kd.engine.optimizer.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """A loader whose batches depend only on the seed and the iteration.

        A subclass may return :func:`ssim_kd.data.build_train_loader` with a custom mapper or data
        set, or any other iterable of batches, which costs the exact resume.
        """
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> EvaluationLoader:
        """Detectron2's own; errors name the image, and no SIGTERM ends its workers."""
        return build_evaluation_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """See :func:`ssim_kd.engine.evaluation.build_evaluator`."""
        return build_evaluator(cfg, dataset_name, output_folder)


class YamlRecipe(ConfigRecipe):
    """The parts of a training or an evaluation, from the command line of a YAML config."""

    keys = KEYS

    def __init__(
        self,
        args: argparse.Namespace,
        add_config: AddConfig | None,
        trainer: type[DistillTrainer],
        *,
        data: bool = True,
    ) -> None:
        """
        Args:
            args: of :func:`ssim_kd.engine.argument_parser`.
            add_config, trainer: of :func:`ssim_kd.engine.run`.
            data: see :func:`load_yaml`.
        """
        loaded = load_yaml(args, add_config, data=data)
        super().__init__(args, loaded)
        cfg: CfgNode = loaded.cfg
        check_config(cfg, evaluate=is_evaluation(args))
        register_datasets(cfg)
        self._trainer = trainer
        self.device, self.folder, self.text = cfg.MODEL.DEVICE, cfg.OUTPUT_DIR, cfg.dump()
        teacher = cfg.MODEL.DISTILL.TEACHER
        self.teacher_names = (teacher.NAME, teacher.WEIGHTS) if cfg.MODEL.DISTILL.ENABLED else ()
        own = {
            method: is_overridden(trainer, DistillTrainer, method)
            for method in ("build_train_loader", "build_evaluator", "test")
        }
        self.own = {
            "own_loader": own["build_train_loader"],
            "own_evaluator": own["build_evaluator"] or own["test"],
        }
        keys = ("LR_SCHEDULER_NAME", "STEPS", "MAX_ITER", "GAMMA", "WARMUP_ITERS", "WARMUP_METHOD")
        values = ", ".join(f"SOLVER.{key} {cfg.SOLVER[key]!r}" for key in keys)
        self.advice = (
            f"It has {values}. Expected WarmupMultiStepLR with STEPS in ascending order, or "
            "WarmupCosineLR."
        )

    def settings(self) -> Settings:
        """The plain values."""
        return settings_of(self.cfg)

    def needs(self) -> Needs:
        """What the student asks of the data sets."""
        return Needs.from_config(self.cfg)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """The schedule of the learning rate."""
        return self._trainer.build_lr_scheduler(self.cfg, optimizer)

    def check(self) -> None:
        """Check the teacher, the schedule and the data sets."""
        cfg = self.cfg
        if cfg.MODEL.DISTILL.ENABLED and cfg.MODEL.META_ARCHITECTURE == "DistilledDetector":
            # The model itself raises it in its first step: to evaluate, it needs no teacher.
            source = teacher_source(cfg)
            if self.settings().expected_ap:
                check_teachers_classes(cfg, source)
        super().check()

    def write_student(self, path: str) -> None:
        """A config of the student that stock Detectron2 reads."""
        write_stock_config(self.cfg, path, weights=FINAL, classes=self.classes)

    def training(self) -> DistillTrainer:
        """Build all parts; config.yaml gets what is the method's own."""
        training = self._trainer(self.cfg)
        if training.cfg != self.cfg and comm.is_main_process():
            text = without_queries(training.cfg.dump())
            path = os.path.join(self.folder, "config.yaml")
            write_atomically(path, lambda file: file.write(text.encode()))
        return training

    def check_evaluation(self, training: DistillTrainer) -> None:  # type: ignore[override]
        """The classes of the built student; all else unless the trainer has its own ``test``."""
        check_class_count(training.student, self.classes, key="DATASETS.TRAIN")
        if is_overridden(training, DefaultTrainer, "test"):
            return
        own_loader = not is_overridden(training, DistillTrainer, "build_test_loader")
        check_evaluation(training.cfg, training, own_loader=own_loader)
        if training.cfg.TEST.AUG.ENABLED:
            build_tta_model(training.cfg, training.student)

    def teacher_weights(self) -> str:
        """The file of the teacher's weights."""
        return teacher_source(self.cfg).weights

    def evaluate_teacher(self) -> Mapping[str, Any]:
        """Evaluate the teacher on the student's data."""
        return self._trainer.test(*self.detector(teacher=True))  # type: ignore[no-any-return]

    def model(self) -> torch.nn.Module:
        """What is trained."""
        return self._trainer.build_model(self.cfg)

    def pictures(self, count: int) -> list[dict[str, Any]]:
        """The first images that are evaluated, as the model takes them."""
        check_tested(self.cfg)
        register_datasets(self.cfg)
        return first_images(self.cfg, count)

    def evaluation(self) -> Callable[[], Any]:
        """Build what ``--eval-only`` or ``--eval-teacher`` evaluates; returns what does so."""
        check_tested(self.cfg)
        return super().evaluation()

    def detector(self, *, teacher: bool) -> tuple[CfgNode, torch.nn.Module]:
        """What is evaluated, and its config."""
        if teacher:
            return teacher_for_evaluation(self.cfg)
        return student_for_evaluation(self.cfg, resume=self.args.resume)

    def evaluate(self, cfg: CfgNode, model: torch.nn.Module) -> Any:
        """Evaluate, also with ``TEST.AUG``, and compare ``TEST.EXPECTED_RESULTS``."""
        results = self._trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(test_time_augmentation(cfg, model, self._trainer))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results


def first_images(cfg: CfgNode, count: int) -> list[dict[str, Any]]:
    """Images of the first TEST set, or TRAIN set if there is none, as an evaluation maps them."""
    name = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)[0]
    mapper = DatasetMapper(cfg, is_train=False)
    return [mapper(record) for record in DatasetCatalog.get(name)[:count]]


def is_overridden(trainer: Any, base: type, name: str) -> bool:
    """Whether a trainer, or its class, has a method other than that of ``base``."""
    method, original = getattr(trainer, name), getattr(base, name)
    return getattr(method, "__func__", method) is not original.__func__
