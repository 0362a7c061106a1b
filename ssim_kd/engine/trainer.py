"""A training of a YAML config: Detectron2's DefaultTrainer, whose parts :class:`Training` takes."""

from collections import OrderedDict
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.utils import comm

from ..data import EvaluationLoader, build_evaluation_loader, build_train_loader
from .evaluation import build_evaluator, build_tta_model, test_time_augmentation
from .optimizer import build_optimizer
from .preflight import check_evaluation, named, settings_of
from .schedule import scale_workers
from .trackers import build_trackers
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
        self.cfg = cfg
        model = self.build_model(cfg)
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
            pictures=self._pictures,
            trackers=lambda: build_trackers(cfg),
            config=cfg,
        )

    def _statistics_loader(self) -> Any:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0  # as DefaultTrainer does
        return self.build_train_loader(cfg)

    def _pictures(self) -> list[dict[str, Any]]:
        name = (*self.cfg.DATASETS.TEST, *self.cfg.DATASETS.TRAIN)[0]
        mapper = DatasetMapper(self.cfg, is_train=False)
        return [mapper(record) for record in DatasetCatalog.get(name)[:3]]

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


def is_overridden(trainer: Any, base: type, name: str) -> bool:
    """Whether a trainer, or its class, has a method other than that of ``base``."""
    method, original = getattr(trainer, name), getattr(base, name)
    return getattr(method, "__func__", method) is not original.__func__
