"""What train_net.py does: read the config, set up, then train or evaluate."""

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

from detectron2.utils import comm

from ..command_line import is_evaluation
from ..config_files import is_lazy
from ..config_loading import AddConfig
from .launch import launch_processes, start_up, with_one_line_errors
from .lazy import LazyRecipe
from .recipe import ConfigRecipe
from .train_loop import NonFiniteError
from .trainer import DistillTrainer, YamlRecipe

_FLAGS = ("resume", "eval_only", "eval_teacher")


def run(
    args: argparse.Namespace,
    add_config: AddConfig | None = None,
    *,
    trainer: type[DistillTrainer] = DistillTrainer,
) -> Any:
    """Train or evaluate, in as many processes as the command line asks for.

    An error before the first step, or values that are not finite, end the program with status 1
    and one line; the traceback is in ``OUTPUT_DIR/log.txt``.

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
            device = recipe_of(args, add_config, trainer, data=False).device
        rest = (args, add_config, trainer)
        return launch_processes(_run_process, args, device=device, main_args=rest)


def main(
    args: argparse.Namespace,
    add_config: AddConfig | None = None,
    *,
    trainer: type[DistillTrainer] = DistillTrainer,
) -> Any:
    """Train or evaluate in this process, which is one of one or more. Arguments as in run()."""
    with contextlib.ExitStack() as stack:
        return _prepare(stack, args, add_config, trainer)()


def _run_process(*given: Any) -> Any:
    with contextlib.ExitStack() as stack:
        with start_up():
            work = _prepare(stack, *given)
        with start_up(NonFiniteError):
            return work()


def recipe_of(
    args: argparse.Namespace,
    add_config: AddConfig | None,
    trainer: type[DistillTrainer],
    *,
    data: bool = True,
) -> ConfigRecipe:
    """The recipe of a command line; ``data``: see :func:`load_yaml`."""
    if is_lazy(args.config_file):
        return LazyRecipe(args, data=data)
    return YamlRecipe(args, add_config, trainer, data=data)


def _prepare(
    stack: contextlib.ExitStack, args: argparse.Namespace, *rest: Any
) -> Callable[[], Any]:
    """All that comes before the first step; returns what is then left to do."""
    if comm.get_world_size() > 1:
        # Before the processes read the data together.
        _check_same_on_all(recipe_of(args, *rest, data=False).text, args)
    recipe = recipe_of(args, *rest)
    # What was read may differ.
    _check_same_on_all(recipe.text, args)
    if is_evaluation(args):
        return recipe.evaluation()
    return recipe.prepare(stack, resume=args.resume).train


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
