"""What train_net.py does: read the config, set up, then train or evaluate."""

import argparse
import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from detectron2.utils import comm

from ..config_files import is_lazy
from .config_loading import AddConfig
from .launch import launch_processes, once, start_up, with_one_line_errors
from .lazy import LazyRecipe
from .output_lock import make_output_dir, output_lock
from .preflight import check_start, check_teacher, same_weights
from .report import log_version
from .settings import Settings
from .trainer import DistillTrainer, YamlRecipe
from .training import Training

logger = logging.getLogger(__name__)

_FLAGS = ("resume", "eval_only", "eval_teacher")


class Recipe(Protocol):
    """What the ways to start a training differ in: how its parts are made.

    The methods are called in this order. Each raises ValueError or OSError, which name the key,
    before the first step.

    Attributes:
        keys: see :class:`Settings`.
        folder: of logs and checkpoints.
        teacher_names: what names the teacher in the config: files, folders.
        text: the config, which all processes have to share.
    """

    keys: Mapping[str, str]
    folder: str
    teacher_names: Sequence[str]
    text: str

    def set_up(self) -> None:
        """Logs, the seed, a copy of the config."""

    def settings(self) -> Settings:
        """The plain values."""

    def check(self) -> None:
        """Check what can be checked before anything is built; in the main process."""

    def write_student(self, path: str) -> None:
        """Write the config of the student without its teacher, which stock Detectron2 reads."""

    def training(self) -> Training:
        """Build all parts."""

    def check_evaluation(self, training: Training) -> None:
        """Check what the evaluations need, which may lie hours ahead; in the main process."""

    def teacher_weights(self) -> str:
        """The file of the teacher's weights; "" for none."""

    def evaluate_teacher(self) -> Mapping[str, Any]:
        """Evaluate the teacher on the student's data."""


def run(
    args: argparse.Namespace,
    add_config: AddConfig | None = None,
    *,
    trainer: type[DistillTrainer] = DistillTrainer,
) -> Any:
    """Train or evaluate, in as many processes as the command line asks for.

    An error before the first step ends the program with status 1 and one line; its traceback is in
    ``OUTPUT_DIR/log.txt``.

    Args:
        args: of :func:`ssim_kd.engine.argument_parser`.
        add_config: adds further keys to a YAML config (those of projects); picklable.
        trainer: of a YAML config: a subclass with loaders, evaluators, hooks or a model of its
            own; picklable.

    Returns:
        the results of the evaluation if they are computed in this process, else None.

    Example:
        >>> class Trainer(DistillTrainer):
        ...     @classmethod
        ...     def build_train_loader(cls, cfg):
        ...         return build_train_loader(cfg, mapper=MyMapper(cfg))
        >>> run(argument_parser().parse_args(), trainer=Trainer)
    """
    with with_one_line_errors():
        # Before any process is started: a wrong key is then reported once.
        with start_up():
            recipe = recipe_of(args, add_config, trainer)
        rest = (args, add_config, trainer, recipe.facts)
        return launch_processes(_run_process, args, device=recipe.device, main_args=rest)


def main(
    args: argparse.Namespace,
    add_config: AddConfig | None = None,
    *,
    trainer: type[DistillTrainer] = DistillTrainer,
) -> Any:
    """Train or evaluate in this process, which is one of one or more. Arguments as in run()."""
    with contextlib.ExitStack() as stack:
        return _prepare(stack, recipe_of(args, add_config, trainer), args)()


def recipe_of(
    args: argparse.Namespace,
    add_config: AddConfig | None,
    trainer: type[DistillTrainer],
    facts: dict[str, int] | None = None,
) -> Any:
    """The recipe of a command line; ``facts`` are those of another process's."""
    if is_lazy(args.config_file):
        return LazyRecipe(args, facts)
    return YamlRecipe(args, add_config, trainer, facts)


def _run_process(args: argparse.Namespace, *rest: Any) -> Any:
    with contextlib.ExitStack() as stack:
        with start_up():
            work = _prepare(stack, recipe_of(args, *rest), args)
        return work()


def _prepare(
    stack: contextlib.ExitStack, recipe: Any, args: argparse.Namespace
) -> Callable[[], Any]:
    """All that comes before the first step; returns what is then left to do."""
    _check_same_on_all(recipe.text, args)
    if args.eval_only or args.eval_teacher:
        make_output_dir(recipe.folder, key=recipe.keys["output_dir"])
        return recipe.evaluation()  # type: ignore[no-any-return]
    return prepare_training(stack, recipe, resume=args.resume).train


def prepare_training(stack: contextlib.ExitStack, recipe: Recipe, *, resume: bool) -> Training:
    """Check, build and begin a training, up to its first step.

    Args:
        stack: holds what the training needs until it ends.
        recipe: makes its parts.
        resume: whether a checkpoint of the folder is taken up.

    Raises:
        ValueError, OSError: what is wrong, on every process.
    """
    settings = recipe.settings()
    make_output_dir(
        recipe.folder,
        teacher=recipe.teacher_names,
        key=recipe.keys.get("output_dir", "output_dir"),
    )
    # Before anything is written there.
    stack.enter_context(output_lock(recipe.folder))
    recipe.set_up()
    log_version()
    once(lambda: check_start(settings, resume=resume))
    once(recipe.check)
    once(lambda: recipe.write_student(os.path.join(recipe.folder, "student.yaml")))
    training = recipe.training()
    once(lambda: recipe.check_evaluation(training))
    training.resume_or_load(resume)
    if training.distills and not training.start_iter:
        once(lambda: same_weights(settings, recipe.teacher_weights()))
        if settings.expected_ap:
            check_teacher(settings, recipe.evaluate_teacher())
    once(training.start_trackers)
    return training


def _check_same_on_all(text: str, args: argparse.Namespace) -> None:
    """Stop if the processes were given different configs or flags."""
    flags = {f"--{k.replace('_', '-')}": getattr(args, k) for k in _FLAGS}
    texts = comm.all_gather(f"{text}{flags}")
    unlike = [rank for rank, text in enumerate(texts) if text != texts[0]]
    if unlike:
        ours, theirs = (set(texts[rank].splitlines()) for rank in (0, unlike[0]))
        raise ValueError(
            f"The config of process {unlike[0]} is not that of process 0: {sorted(theirs - ours)} "
            f"for {sorted(ours - theirs)}. Start all processes with the same arguments."
        )
