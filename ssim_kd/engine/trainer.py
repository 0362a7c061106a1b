"""A training of a YAML config: Detectron2's DefaultTrainer, whose parts :class:`Training` takes."""

import argparse
import logging
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
from ..config import write_stock_config
from ..data import (
    DatasetSummary,
    EvaluationLoader,
    Needs,
    build_evaluation_loader,
    build_train_loader,
    check_datasets,
    class_names,
    register_datasets,
)
from ..modeling import DistilledDetector, resolved_config, teacher_source
from ..sharing import without_queries
from ..writing import write_atomically
from .config_loading import AddConfig, load_yaml
from .evaluation import (
    build_evaluator,
    build_tta_model,
    set_up_evaluation,
    set_up_training,
    student_for_evaluation,
    teacher_for_evaluation,
    test_time_augmentation,
)
from .launch import once
from .optimizer import build_optimizer
from .preflight import (
    KEYS,
    check_class_count,
    check_evaluation,
    check_schedule,
    check_scored,
    check_tested,
    named,
    settings_of,
)
from .schedule import scale_workers
from .settings import Settings
from .trackers import build_trackers
from .training import Training

logger = logging.getLogger(__name__)


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
        if isinstance(model, DistilledDetector):
            cfg = resolved_config(cfg, list(model.distillers.values()))
        self.cfg = cfg
        with named("SOLVER (the optimizer)"):
            optimizer = self.build_optimizer(cfg, model)
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

    def check_evaluation(self) -> None:
        """See :func:`ssim_kd.engine.preflight.check_evaluation`; builds the TTA wrapper as well.

        A subclass with a ``test`` of its own is not checked.
        """
        if is_overridden(self, DefaultTrainer, "test"):
            return
        own_loader = not is_overridden(self, DistillTrainer, "build_test_loader")
        check_evaluation(self.cfg, self, own_loader=own_loader)
        if self.cfg.TEST.AUG.ENABLED:
            build_tta_model(self.cfg, self.student)

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
        """A loader whose batches depend on the seed and the iteration alone.

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


class YamlRecipe:
    """The parts of a training or an evaluation, from the command line of a YAML config."""

    keys = KEYS

    def __init__(
        self,
        args: argparse.Namespace,
        add_config: AddConfig | None,
        trainer: type[DistillTrainer],
        facts: dict[str, int] | None = None,
    ) -> None:
        """
        Args:
            args: of :func:`ssim_kd.engine.argument_parser`.
            add_config, trainer: of :func:`ssim_kd.engine.run`.
            facts: of :func:`load_yaml`, from another process.
        """
        loaded = load_yaml(args, add_config, facts)
        self.cfg, self.notes, self.facts = loaded.cfg, loaded.notes, loaded.facts
        # What Detectron2's default_setup opens.
        self._args = argparse.Namespace(**{**vars(args), "config_file": loaded.config_file})
        self._trainer = trainer
        self.device, self.folder = self.cfg.MODEL.DEVICE, self.cfg.OUTPUT_DIR
        distill = self.cfg.MODEL.DISTILL
        teacher = (distill.TEACHER.NAME, distill.TEACHER.WEIGHTS)
        self.teacher_names = teacher if distill.ENABLED else ()
        self.text = self.cfg.dump()

    def settings(self) -> Settings:
        """The plain values."""
        return settings_of(self.cfg)

    def set_up(self) -> None:
        """Logs, the seed, a copy of the config."""
        set_up_training(self.cfg, self._args, self.folder)
        for note in self.notes:
            logger.info("%s", note)
        register_datasets(self.cfg)

    def check(self) -> None:
        """Check the teacher, the schedule and the data sets."""
        cfg = self.cfg
        if cfg.MODEL.DISTILL.ENABLED and cfg.MODEL.META_ARCHITECTURE == "DistilledDetector":
            # The model itself raises it in its first step: to evaluate, it needs no teacher.
            teacher_source(cfg)
        check_schedule(cfg, self._trainer)
        summaries = self._check_data(train=True)
        self._classes = class_names(summaries)
        if cfg.MODEL.DISTILL.ENABLED:
            check_scored(self.settings(), Needs.from_config(cfg), summaries)

    def _check_data(self, *, train: bool) -> list[DatasetSummary]:
        own = {
            method: is_overridden(self._trainer, DistillTrainer, method)
            for method in ("build_train_loader", "build_evaluator", "test")
        }
        summaries = check_datasets(
            Needs.from_config(self.cfg),
            train=train,
            own_loader=own["build_train_loader"],
            own_evaluator=own["build_evaluator"] or own["test"],
        )
        for summary in summaries:
            logger.info("%s", summary)
        return summaries

    def write_student(self, path: str) -> None:
        """A config of the student that stock Detectron2 reads."""
        write_stock_config(self.cfg, path, weights=FINAL, classes=self._classes)

    def training(self) -> DistillTrainer:
        """Build all parts; config.yaml gets what is the method's own."""
        training = self._trainer(self.cfg)
        if training.cfg != self.cfg and comm.is_main_process():
            text = without_queries(training.cfg.dump())
            path = os.path.join(self.folder, "config.yaml")
            write_atomically(path, lambda file: file.write(text.encode()))
        return training

    def check_evaluation(self, training: DistillTrainer) -> None:
        """Also what the built student predicts; see :meth:`DistillTrainer.check_evaluation`."""
        check_class_count(training.student, self._classes, key="DATASETS.TRAIN")
        training.check_evaluation()

    def teacher_weights(self) -> str:
        """The file of the teacher's weights."""
        return teacher_source(self.cfg).weights

    def evaluate_teacher(self) -> Mapping[str, Any]:
        """Evaluate the teacher on the student's data."""
        return self._trainer.test(*teacher_for_evaluation(self.cfg))

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
        args = self._args
        check_tested(self.cfg)
        set_up_evaluation(self.folder, args, self.text, seed=self.cfg.SEED)
        register_datasets(self.cfg)
        once(lambda: self._check_data(train=False))
        if args.eval_teacher:
            cfg, model = teacher_for_evaluation(self.cfg)
        else:
            cfg, model = student_for_evaluation(self.cfg, resume=args.resume)

        def evaluate() -> Any:
            results = self._trainer.test(cfg, model)
            if cfg.TEST.AUG.ENABLED:
                results.update(test_time_augmentation(cfg, model, self._trainer))
            if comm.is_main_process():
                verify_results(cfg, results)
            return results

        return evaluate


def first_images(cfg: CfgNode, count: int) -> list[dict[str, Any]]:
    """Images of the first TEST set, or TRAIN set if there is none, as an evaluation maps them."""
    name = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)[0]
    mapper = DatasetMapper(cfg, is_train=False)
    return [mapper(record) for record in DatasetCatalog.get(name)[:count]]


def is_overridden(trainer: Any, base: type, name: str) -> bool:
    """Whether a trainer, or its class, has a method other than that of ``base``."""
    method, original = getattr(trainer, name), getattr(base, name)
    return getattr(method, "__func__", method) is not original.__func__
