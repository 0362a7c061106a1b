"""What a training is made of: a :class:`Recipe` makes the parts, and checks them before."""

import argparse
import contextlib
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from torch import nn

from ..config_files import Loaded
from ..config_loading import value_of
from ..data import DatasetSummary, Needs, check_datasets, class_names, once
from ..logs import end_logs
from ..sharing import without_queries
from .output_lock import make_output_dir, output_lock
from .preflight import check_scored, check_start, check_teacher, same_weights
from .report import log_version
from .settings import Settings
from .training import Training

logger = logging.getLogger(__name__)


class Recipe:
    """What the ways to start a training differ in: how its parts are made.

    :meth:`prepare` calls the methods. Each raises ValueError or OSError, which name the key, before
    the first step.

    Attributes:
        keys: see :class:`Settings`.
        folder: of logs and checkpoints.
        teacher_names: what names the teacher in the config: files, folders.
        settings: the plain values.
        set_up: logs, the seed, a copy of the config.
        training: builds all parts.
        teacher_weights: the file of the teacher's weights; "" for none.
        evaluate_teacher: evaluates the teacher on the student's data.
    """

    keys: Mapping[str, str] = {}
    folder: str
    teacher_names: Sequence[str] = ()
    settings: Callable[[], Settings]
    set_up: Callable[[], None]
    training: Callable[[], Training]
    teacher_weights: Callable[[], str]
    evaluate_teacher: Callable[[], Mapping[str, Any]]

    def prepare(self, stack: contextlib.ExitStack, *, resume: bool) -> Training:
        """Check, build and begin a training, up to its first step.

        Args:
            stack: holds what the training needs until it ends.
            resume: whether a checkpoint of the folder is taken up.

        Raises:
            ValueError, OSError: what is wrong, on every process.
        """
        settings = self.settings()
        key = self.keys.get("output_dir", "output_dir")
        make_output_dir(self.folder, teacher=self.teacher_names, key=key)
        # Before anything is written there.
        stack.enter_context(output_lock(self.folder))
        self.set_up()
        log_version()
        once(lambda: check_start(settings, resume=resume))
        once(self.check)
        once(lambda: self.write_student(os.path.join(self.folder, "student.yaml")))
        training = self.training()
        once(lambda: self.check_evaluation(training))
        training.resume_or_load(resume)
        if training.distills and not training.start_iter:
            once(lambda: same_weights(settings, self.teacher_weights()))
            if settings.expected_ap:
                check_teacher(settings, self.evaluate_teacher())
        once(training.start_trackers)
        return training

    def check(self) -> None:
        """Check what can be checked before anything is built; in the main process."""

    def write_student(self, path: str) -> None:
        """Write the config of the student without its teacher, which stock Detectron2 reads."""

    def check_evaluation(self, training: Training) -> None:
        """Check what the evaluations need, which may lie hours ahead; in the main process."""


class ConfigRecipe(Recipe):
    """A recipe from the command line of a config file, of either language.

    Attributes:
        cfg: the config.
        text: of it, which all processes have to share.
        device: "cuda" or "cpu".
        classes: names of the classes of the data; () if they are not known.
        needs: what the student asks of the data sets.
        own: which parts code of the user's builds, for :func:`ssim_kd.data.check_datasets`.
        scheduler: makes the schedule of the learning rate.
        advice: on the schedule, for the message.
        model: builds what is trained.
        pictures: loads so many images, the first that are evaluated, as the model takes them.
        detector: builds what is evaluated, the arguments of ``evaluate``.
        evaluate: returns results by task.
    """

    text: str
    device: str
    classes: Sequence[str] = ()
    needs: Callable[[], Needs]
    own: Mapping[str, bool]
    scheduler: Callable[[torch.optim.Optimizer], Any]
    advice: str
    model: Callable[[], nn.Module]
    pictures: Callable[[int], list[dict[str, Any]]]
    detector: Callable[..., tuple]
    evaluate: Callable[..., Mapping[str, Any]]

    def __init__(self, args: argparse.Namespace, loaded: Loaded) -> None:
        """
        Args:
            args: of :func:`ssim_kd.engine.argument_parser`.
            loaded: what they come to.
        """
        self.cfg, self.notes = loaded.cfg, loaded.notes
        # What Detectron2's default_setup opens.
        self.args = argparse.Namespace(**{**vars(args), "config_file": loaded.config_file})

    def set_up(self) -> None:
        """Detectron2's default_setup, and the log of ssim_kd, without keys of signed URLs."""
        end_logs()
        shown = argparse.Namespace(**without_queries(vars(self.args)))
        if shown.config_file:
            with PathManager.open(self.args.config_file, "r") as file:
                text = file.read()
            if without_queries(text) != text:
                shown.config_file = ""  # which the log would show
        default_setup(without_queries(self.cfg), shown)
        setup_logger(self.folder, distributed_rank=comm.get_rank(), name="ssim_kd")
        for note in self.notes:
            logger.info("%s", note)

    def check(self) -> None:
        """Check the schedule and the data sets."""
        # For a parameter of no model.
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        try:
            self.scheduler(optimizer)
        except Exception as error:
            raise ValueError(
                f"The schedule of the learning rate cannot be built: {error}. {self.advice}"
            ) from error
        summaries = self._check_data(train=True)
        self.classes = class_names(summaries)
        check_scored(self.settings(), self.needs(), summaries)

    def _check_data(self, *, train: bool) -> list[DatasetSummary]:
        summaries = check_datasets(self.needs(), train=train, **self.own)
        for summary in summaries:
            logger.info("%s", summary)
        return summaries

    def evaluation(self) -> Callable[[], Any]:
        """Build what ``--eval-only`` or ``--eval-teacher`` evaluates; returns what does so."""
        make_output_dir(self.folder, key=self.keys["output_dir"])
        # As default_setup, which would overwrite the config.yaml of the training in the folder.
        end_logs()
        rank, seed = comm.get_rank(), value_of(self.cfg, self.keys["seed"])
        for name in ("fvcore", "detectron2", "ssim_kd"):
            setup_logger(self.folder or None, distributed_rank=rank, name=name)
        logger.info("Environment info:\n%s", collect_env_info())
        logger.info("Command line arguments: %s", without_queries(str(self.args)))
        logger.info("Running with full config:\n%s", without_queries(self.text))
        seed_all_rng(None if seed is None or seed < 0 else seed + rank)
        once(lambda: self._check_data(train=False))
        return functools.partial(self.evaluate, *self.detector(teacher=self.args.eval_teacher))

    def evaluate_teacher(self) -> Mapping[str, Any]:
        """Evaluate the teacher on the student's data."""
        return self.evaluate(*self.detector(teacher=True))
