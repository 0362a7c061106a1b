"""Distillation from Python: ``distill(student, teacher, ...)``, in a script or a notebook."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.engine.defaults import default_writers
from detectron2.utils.file_io import PathManager
from torch import nn

from ..checkpoint import StudentCheckpointer
from ..command_line import argument_parser
from ..modeling import DistilledDetector, Distiller, FrozenTeacher, SSIMDistiller
from .defaults import main
from .lazy import LazyTrainer
from .report import write_report
from .trainer import DistillTrainer


def distill(
    student: str | nn.Module,
    teacher: str | nn.Module | FrozenTeacher,
    *,
    output_dir: str = "output",
    opts: Sequence[Any] = (),
    data: str = "",
    epochs: float | None = None,
    batch: int | None = None,
    resume: bool = False,
    add_config: Callable[[CfgNode], None] | None = None,
    loader: Iterable[list[dict[str, Any]]] | None = None,
    distillers: Sequence[Distiller] = (),
    max_iter: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:
    """Train a student with a teacher, in this process.

    By config, as the command line does:

        distill("my_detector.yaml", "output/teacher", data="data.yaml", epochs=12)

    Or by modules, with a loader of one's own:

        distill(student, teacher, loader=loader, max_iter=1000, distillers=[SSIMDistiller()])

    Args:
        student: a config file (.yaml), or a detector.
        teacher: what ``--teacher`` takes; with a module as student also a detector.
        output_dir: for checkpoints and logs.
        opts: KEY, VALUE, ... overrides of the student's config.
        data, epochs, batch, resume: as ``--data``, ``--epochs``, ``--batch``, ``--resume``.
        add_config: adds further keys to the config, e.g. ``add_project_configs``.
        loader: batches in Detectron2's format, for a module as student.
        distillers: the terms, for a module as student; one :class:`SSIMDistiller` if empty.
        max_iter: steps, for a module as student.
        optimizer: for a module as student; of the distillers' parameters too. None: SGD with a
            learning rate of 0.001 and momentum 0.9.

    Returns:
        the trainer, trained: ``trainer.student`` is the detector.

    Raises:
        ValueError: arguments that do not belong together, or what the command line raises.
    """
    if isinstance(student, nn.Module):
        if loader is None or max_iter < 1:
            raise ValueError(
                f"The student is a module, with max_iter {max_iter} and loader {loader!r}; "
                "expected a loader of batches and max_iter >= 1."
            )
        return _distill_module(
            student, teacher, loader, distillers, max_iter, optimizer, output_dir, resume
        )
    if not isinstance(teacher, str):
        raise ValueError("The student is a config; expected a name for the teacher as well.")
    arguments = ["--config-file", student, "--teacher", teacher, "--data", data]
    arguments += ["--resume"] if resume else []
    args: argparse.Namespace = argument_parser().parse_args(arguments)
    args.epochs, args.batch = epochs, batch
    args.opts = [str(x) for x in ("OUTPUT_DIR", output_dir, *opts)]
    trained: list[DistillTrainer] = []

    class Kept(DistillTrainer):
        def train(self) -> Any:
            trained.append(self)
            return super().train()

    main(args, add_config, trainer=Kept)
    return trained[0]


def _distill_module(
    student: nn.Module,
    teacher: Any,
    loader: Iterable[list[dict[str, Any]]],
    distillers: Sequence[Distiller],
    max_iter: int,
    optimizer: torch.optim.Optimizer | None,
    output_dir: str,
    resume: bool,
) -> LazyTrainer:
    frozen = FrozenTeacher.load_from(teacher) if isinstance(teacher, str) else teacher
    model = DistilledDetector(
        student=student,
        teacher=frozen,
        distillers=list(distillers) or [SSIMDistiller()],
        max_iter=max_iter,
        log_period=0,
    )
    model.to(next(student.parameters()).device)
    PathManager.mkdirs(output_dir)
    if optimizer is None:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)
    else:
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        rest = [p for p in model.distillers.parameters() if id(p) not in known]
        if rest:
            optimizer.add_param_group({"params": rest})
    trainer = LazyTrainer(model, loader, optimizer, output_dir=output_dir)
    trainer.student = student
    trainer.checkpointer = StudentCheckpointer(
        student, output_dir, trainer=trainer, distillers=model.distillers
    )
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.PeriodicCheckpointer(trainer.checkpointer, max(1, max_iter // 10)),
            hooks.PeriodicWriter(default_writers(output_dir, max_iter)),
        ]
    )
    resumed = trainer.checkpointer.resume_or_load("", resume=resume)
    trainer.train(trainer.iter + 1 if resumed else 0, max_iter)
    write_report(output_dir)
    return trainer
