"""One training, whatever its parts were made from: the step, the hooks, checkpoints, exact resume.

Which checkpoint a resume takes is up to :class:`ssim_kd.checkpoint.StudentCheckpointer`; the order
of images, to :class:`ssim_kd.data.TrainLoader`; random numbers, to
:class:`ssim_kd.engine.hooks.Reseed`.
"""

import hashlib
import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.engine import create_ddp_model, hooks
from detectron2.engine.defaults import default_writers
from detectron2.engine.train_loop import TrainerBase
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.file_io import PathManager
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from ..checkpoint import ResumeError, StudentCheckpointer
from ..data import TrainLoader, drawn_seed
from ..modeling import DistilledDetector, LoadedTeacher, unwrap
from ..sharing import without_queries
from ..trackers import TrackerWriter
from .hooks import (
    BestCheckpoint,
    PreciseBN,
    RankStates,
    Reseed,
    SavedEvaluation,
    VisualizeDistillation,
)
from .report import write_report, write_run
from .settings import Settings, as_text, differences
from .signals import StopOnSignal
from .train_loop import DistillStep
from .writers import GuardedWriter, PeriodicWriter

logger = logging.getLogger(__name__)

Evaluate = Callable[[], Mapping[str, Any]]
#: Keys of a config that change nothing in what a run computes.
_LEFT_OUT = ("OUTPUT_DIR", "TRACKING", "output_dir", "train.output_dir", "train.writers")


class Training(DistillStep):
    """Trains a :class:`DistilledDetector`, or any stock detector, made of parts.

    It knows no config language: the parts and plain values go in, and all else is the same for
    every training. Checkpoints hold the plain student under "model", and all that an exact resume
    needs; processes may run on CPUs; metrics are read one step late; an evaluation scores on every
    process what is saved.

    Attributes:
        student: the detector whose weights are saved.
        distills: whether there is a teacher.
        teacher_sha256: of the teacher's weights; "" without a teacher.
        seed: of the run: that of the settings, or what was drawn if that is negative.
        model: what is trained, in DDP with several processes.
        data_loader, optimizer, scheduler, checkpointer, settings: as in DefaultTrainer.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        model: nn.Module,
        loader: Any,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        evaluate: Evaluate = dict,
        evaluate_last: Evaluate | None = None,
        statistics_loader: Callable[[], Any] | None = None,
        pictures: Callable[[], list[dict[str, Any]]] | None = None,
        trackers: Callable[[], Sequence[EventWriter]] = tuple,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            settings: plain values.
            model: takes a batch, returns a dict of scalar losses; on its device.
            loader: a :class:`TrainLoader`, or any iterable of batches, which costs the exact
                order of images at a resume: a warning says so. One that ends is iterated again.
            optimizer: of the model's parameters.
            scheduler: of the optimizer's learning rate.
            evaluate: returns results by task, or by data set if there are several.
            evaluate_last: in addition, after the last step.
            statistics_loader: makes the loader of ``settings.precise_bn``.
            pictures: loads the images of ``settings.vis_period``.
            trackers: makes writers in addition to Detectron2's, in the main process.
            config: nested, of any values: a resume logs how it differs from that of the start.

        Raises:
            ValueError: what the teacher's ``load`` raises.
        """
        self._evaluate, self._evaluate_last = evaluate, evaluate_last
        self._statistics_loader, self._pictures = statistics_loader, pictures
        self._trackers = trackers
        self._config = self._started_with = as_text(
            without_queries(config or {}), left_out=_LEFT_OUT
        )
        self._stop = StopOnSignal(settings.grace_period, key=settings.key("grace_period"))
        self._best = BestCheckpoint()
        self._last_eval_results: Mapping[str, Any] = {}

        detector = unwrap(model)
        distilled = detector if isinstance(detector, DistilledDetector) else None
        self.student = detector if distilled is None else distilled.student
        self.distills = distilled is not None and distilled.teacher is not None
        self.teacher_sha256 = ""
        own: dict[str, nn.Module] = {}
        if distilled is not None and self.distills:
            # Now rather than in the first step: what is wrong with its weights is known at once.
            teacher = distilled.load_teacher()
            self.teacher_sha256 = "" if teacher is None else _fingerprint(teacher)
            # The training logs the metrics itself, a step late.
            distilled.log_period = 0
            own["distillers"] = distilled.distillers
        on_gpu = next(model.parameters()).is_cuda
        devices = [torch.cuda.current_device()] if on_gpu else None
        if not on_gpu and comm.get_world_size() > 1:
            synced = [n for n, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)]
            if synced:
                raise ValueError(
                    f"{len(synced)} norms, {synced[0]} for example, are SyncBatchNorm, which needs "
                    "GPUs in several processes; expected another norm (BN, GN, naiveSyncBN), or "
                    "one process."
                )
        parallel = create_ddp_model(model, device_ids=devices, **settings.ddp)
        super().__init__(parallel, loader, optimizer, settings)
        self.max_iter, self.scheduler = settings.max_iter, scheduler
        if isinstance(loader, TrainLoader):
            self.seed = int(loader.seed)
        else:
            self.seed = settings.seed if settings.seed >= 0 else drawn_seed()
            logger.warning(
                "%s is a %s, whose order of images a resume cannot take up: all else is restored. "
                "Exact is ssim_kd.data.build_train_loader, which takes a mapper and a data set.",
                *(settings.key("loader"), type(loader).__name__),
            )
        self.checkpointer = StudentCheckpointer(
            self.student,
            settings.output_dir,
            keep=settings.checkpoints_to_keep,
            partial=settings.weights_partial,
            keys=(settings.key("weights"), settings.key("weights_partial")),
            # First: it logs what has changed in the config, before anything else does not fit.
            trainer=weakref.proxy(self),
            **own,
        )
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[Any]:
        """Every hook; those with collective operations in the same order on every process."""
        settings, main = self.settings, comm.is_main_process()
        # What changes the model or the learning rate, whose state after the step a checkpoint
        # holds.
        found = [Reseed(), hooks.IterationTimer(), hooks.LRScheduler(), *self._precise_bn()]
        found += [RankStates(self.student, self._checkpoint_is_due), self._stop]
        if main:
            found.append(hooks.PeriodicCheckpointer(self.checkpointer, settings.checkpoint_period))
        found += [SavedEvaluation(settings.eval_period, self._test, self._stop)]
        # Pictures and the last evaluation before the writers, which only the main process has.
        if main and self.distills and settings.vis_period > 0 and self._pictures is not None:
            found.append(
                VisualizeDistillation(
                    settings.vis_period,
                    self._pictures,
                    image_format=settings.image_format,
                    key=settings.key("vis_period"),
                )
            )
        if self._evaluate_last is not None:
            found.append(SavedEvaluation(0, self._evaluate_last, self._stop))
        found.append(self._best)
        if main:
            periods = {"period": settings.log_period, "eval_period": settings.eval_period}
            found.append(PeriodicWriter(self.build_writers(), **periods))
        return found

    def _precise_bn(self) -> list[hooks.HookBase]:
        settings, make = self.settings, self._statistics_loader
        if not settings.precise_bn or make is None or not get_bn_modules(self.model):
            return []
        loader = make()
        exact = isinstance(loader, TrainLoader)
        kind, model = (PreciseBN, self.student) if exact else (hooks.PreciseBN, self.model)
        return [kind(settings.eval_period, model, loader, settings.precise_bn)]

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's writers and the trackers; none of them can stop the training."""
        # The trackers first: TensorBoard's writer clears the pictures.
        standard = default_writers(self.settings.output_dir, self.max_iter)
        return [GuardedWriter(w) for w in (*self._trackers(), *standard)]

    def start_trackers(self) -> None:
        """Open the run in each tracker, or continue it if the training was resumed.

        Raises:
            ValueError: a tracker cannot be reached or configured.
        """
        for hook in self._writers_hooks():
            for writer in hook._writers:
                tracker = writer.writer if isinstance(writer, GuardedWriter) else writer
                if isinstance(tracker, TrackerWriter):
                    tracker.start(resume=self.start_iter > 0)

    def _writers_hooks(self) -> list[hooks.PeriodicWriter]:
        return [hook for hook in self._hooks if isinstance(hook, hooks.PeriodicWriter)]

    def _checkpoint_is_due(self) -> bool:
        done, period = self.iter + 1, self.settings.eval_period
        return (
            done % self.settings.checkpoint_period == 0
            or done >= self.max_iter
            or (period > 0 and done % period == 0)
            or self.should_stop
        )

    def _test(self) -> Mapping[str, Any]:
        self._last_eval_results = self._evaluate()
        self._best.offer(self._last_eval_results or {})
        return self._last_eval_results

    def train(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Train to the end, from where :meth:`resume_or_load` has begun.

        Returns:
            the results of the last evaluation; empty but in the main process.
        """
        distilled = unwrap(self.model)
        if isinstance(distilled, DistilledDetector):
            # Before hooks see the weights: an average of them begins with these.
            distilled.inherit(self.start_iter)
        if comm.is_main_process():
            write_run(
                self.settings,
                seed=self.seed,
                teacher=distilled.teacher if self.distills else None,
                sha256=self.teacher_sha256,
            )
        TrainerBase.train(self, self.start_iter, self.max_iter)
        return self._last_eval_results

    def after_train(self) -> None:
        """Write what is still on its way, then run the hooks; after an error do not evaluate."""
        if self.iter >= self.max_iter:
            self.flush()
        else:
            # In the last iteration EvalHook takes a failed training for a finished one.
            self._hooks[:] = [h for h in self._hooks if not isinstance(h, hooks.EvalHook)]
        # The workers end here, even if an error's traceback keeps the iterator.
        self.close()
        try:
            super().after_train()
        except BaseException:
            # An evaluation, say: the writers, whose turn has not come, hold results and open runs.
            for hook in self._writers_hooks():
                hook.after_train()
            raise
        finally:
            self._stop.give_back()
        if isinstance(self.data_loader, TrainLoader):
            self.data_loader.log_skipped()
        # After all that has to be saved: SIGTERM may end the process here.
        if self.iter >= self.max_iter and self.settings.report:
            write_report(self.settings.output_dir)

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from the last checkpoint of the folder, or start from the weights.

        Args:
            resume: if there is a checkpoint, restore all of the training's state from it.

        Raises:
            ValueError: weights or a checkpoint that do not fit.
        """
        settings = self.settings
        resumed = self.checkpointer.resume_or_load(settings.weights, resume=resume)
        if not resumed:
            if not settings.weights:
                self._warn_of_random_frozen()
            return
        self.start_iter = self.iter + 1
        if self.start_iter >= self.max_iter:
            logger.warning(
                "The checkpoint is at iteration %d and %s is %d: nothing is left to train.",
                *(self.iter, settings.key("max_iter"), self.max_iter),
            )
        final = os.path.join(settings.output_dir, "model_final.pth")
        # The run was killed between its last periodic checkpoint and the final one.
        if self.iter == self.max_iter - 1 and not PathManager.isfile(final):
            self.checkpointer.save("model_final", iteration=self.iter)

    def _warn_of_random_frozen(self) -> None:
        frozen = [name for name, p in self.student.named_parameters() if not p.requires_grad]
        norms = [m for m in self.student.modules() if isinstance(m, FrozenBatchNorm2d)]
        if frozen or norms:
            logger.warning(
                "%s is empty, so that the student starts from random weights, of which %d tensors "
                "and %d FrozenBN layers will never be trained: training is likely to diverge. From "
                "scratch, freeze no layer (MODEL.BACKBONE.FREEZE_AT 0) and use the norms 'GN' or "
                "'BN' (MODEL.RESNETS.NORM).",
                *(self.settings.key("weights"), len(frozen), len(norms)),
            )

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs in addition to the weights."""
        # Nothing that is not finite gets saved.
        self.flush()
        state = TrainerBase.state_dict(self)
        state["teacher_sha256"] = self.teacher_sha256
        state["config"] = self._started_with
        state["skipped_steps"] = self.skipped
        exact = isinstance(self.data_loader, TrainLoader)
        state["data"] = self.data_loader.state_dict() if exact else {"seed": self.seed}
        state["optimizer"] = self.optimizer.state_dict()
        state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up :meth:`state_dict`.

        Raises:
            ResumeError: the run was trained with another teacher, or by a trainer that saves no
                optimizer.
        """
        settings = self.settings
        if "optimizer" not in state_dict:
            raise ResumeError(
                "--resume: the checkpoint was written by another trainer, e.g. Detectron2's own, "
                "and lacks what an exact resume needs. Start from its weights instead: "
                f"{settings.key('weights')}, another {settings.key('output_dir')}, no --resume."
            )
        teacher = state_dict.get("teacher_sha256", self.teacher_sha256)
        if teacher != self.teacher_sha256:
            raise ResumeError(
                f"--resume: the checkpoint was trained with the teacher of SHA-256 "
                f"{teacher or '(none)'}, but {settings.key('teacher')} is that of "
                f"{self.teacher_sha256 or '(none)'}. Resume with the former, or start anew in "
                f"another {settings.key('output_dir')}."
            )
        self._warn_of_changes(state_dict.get("config"))
        if "loss_normalizer" in state_dict:  # an older checkpoint, of one process
            self.student.loss_normalizer = state_dict["loss_normalizer"]
        TrainerBase.load_state_dict(self, state_dict)
        self.skipped = state_dict.get("skipped_steps", 0)
        data = state_dict.get("data", {"seed": self.seed})
        self.seed = int(data["seed"])
        if isinstance(self.data_loader, TrainLoader):
            self.data_loader.resume(self.iter + 1, data)
        else:
            logger.warning(
                "--resume: the training loader, a %s, begins anew: from here on the order of "
                "images is not that of an uninterrupted run.",
                type(self.data_loader).__name__,
            )
        self.optimizer.load_state_dict(state_dict["optimizer"])
        if state_dict.get("grad_scaler"):  # else the run began without a scaler
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])

    def _warn_of_changes(self, started_with: str | None) -> None:
        if started_with is None:
            logger.warning(
                "--resume: the checkpoint was written by an earlier version or another trainer, "
                "and does not name its teacher, config and seed: none of them is compared, and the "
                "order of images is not that of an uninterrupted run."
            )
            return
        changes = differences(self._config, started_with)
        if changes:
            logger.warning(
                "--resume: the config is not the one that the run was started with. %s. Learning "
                "rate, momentum and weight decay go on as they were, and so does a seed; all else "
                "follows the config of now. To change those, start anew in another %s.",
                *("; ".join(changes), self.settings.key("output_dir")),
            )
        # The next resume warns again.
        self._started_with = started_with


def _fingerprint(teacher: LoadedTeacher) -> str:
    """The SHA-256 of a teacher's weights: of their file, or of a module's that came from none."""
    if teacher.sha256:
        return teacher.sha256
    digest = hashlib.sha256()
    for name, value in sorted(teacher.backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
