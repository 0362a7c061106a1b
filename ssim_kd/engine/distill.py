"""Distillation from Python: ``distill(student, teacher, ...)``, in a script or a notebook."""

import contextlib
import copy
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import inference_context
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.optim.lr_scheduler import ConstantLR

from ..command_line import argument_parser
from ..config_files import is_lazy
from ..data import TrainLoader
from ..modeling import (
    DistilledDetector,
    Distiller,
    FrozenTeacher,
    SSIMDistiller,
)
from ..modeling.teacher_config import source_of
from .defaults import recipe_of
from .optimizer import add_groups
from .recipe import Recipe
from .settings import Settings
from .trainer import DistillTrainer
from .training import Training

# Arguments of distill() that a config, or modules, read.
_OF_CONFIGS = {"opts": (), "data": "", "epochs": None, "batch": None, "add_config": None}
_OF_MODULES = {
    "loader": None,
    "distillers": (),
    "max_iter": 0,
    "optimizer": None,
    "scheduler": None,
    "evaluate": None,
}


def distill(
    student: str | Path | nn.Module,
    teacher: str | Path | nn.Module | FrozenTeacher,
    *,
    output_dir: str | Path = "output",
    resume: bool = False,
    opts: Sequence[Any] = (),
    data: str | Path = "",
    epochs: float | None = None,
    batch: int | None = None,
    add_config: Callable[[CfgNode], None] | None = None,
    loader: Iterable[list[dict[str, Any]]] | None = None,
    distillers: Sequence[Distiller] = (),
    max_iter: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, Any]] | None = None,
    **settings: Any,
) -> Training:
    """Train a student with a teacher, in this process.

    By config, as the command line does:

        distill("my_detector.yaml", "output/teacher", data="data.yaml", epochs=12)

    Or by modules, with a custom loader:

        distill(student, teacher, loader=loader, max_iter=1000, distillers=[SSIMDistiller()])

    Args:
        student: a config file (.yaml or .py), or a detector on its device.
        teacher: what ``--teacher`` takes; with a module as student also a detector.
        output_dir: for checkpoints and logs.
        resume: as ``--resume``.
        opts: overrides of the student's config: KEY, VALUE, ... of a YAML, "key=value" of a
            LazyConfig.
        data, epochs, batch: as ``--data``, ``--epochs``, ``--batch``, for a config as student.
        add_config: adds further keys to a YAML config, e.g. ``add_project_configs``.
        loader: batches in Detectron2's format, for a module as student. The resume is exact with
            :func:`ssim_kd.data.build_train_loader`.
        distillers: the terms, for a module as student; one :class:`SSIMDistiller` if empty.
        max_iter: steps, for a module as student.
        optimizer: for a module as student. None: SGD with a learning rate of 0.001 and momentum
            0.9. Parameters of the distillers that it does not have are added to it; those that a
            method trains by a separate optimizer are trained by that.
        scheduler: makes the schedule of the learning rate from the optimizer, for a module as
            student. None: it is constant.
        evaluate: for a module as student: takes the student, in eval mode, and returns results by
            task, {"bbox": {"AP": 30.2}}. The best box AP is kept as model_best.pth.
        settings: for a module as student: fields of :class:`Settings` (``eval_period``,
            ``checkpoint_period``, ``seed``, ``amp``, ``accumulate``, ...).

    Returns:
        the training, at its end: ``training.student`` is the detector.

    Raises:
        TypeError: an argument that has no effect for this kind of student.
        ValueError: arguments that do not belong together, or what the command line raises.
    """
    given = {name: value for name, value in locals().items() if name in _OF_CONFIGS | _OF_MODULES}
    of_modules = isinstance(student, nn.Module)
    unused = [
        name
        for name, default in (_OF_CONFIGS if of_modules else _OF_MODULES).items()
        if given[name] is not default
    ]
    if not of_modules:
        unused += settings
    if unused:
        kind = "a module" if of_modules else f"the config {student}"
        raise TypeError(
            f"distill() takes no {', '.join(unused)} for {kind} as student: without effect there. "
            + ("Expected modules instead." if of_modules else "Expected its keys, in opts.")
        )
    recipe: Recipe
    if isinstance(student, nn.Module):
        if loader is None:
            raise ValueError("The student is a module, and loader is None; expected batches.")
        parts = {name: given[name] for name in _OF_MODULES if name != "max_iter"}
        settings.setdefault("checkpoint_period", max(1, max_iter // 10))
        if "weights" in settings:
            settings["weights"] = os.path.expanduser(settings["weights"])
        plain = Settings(os.path.expanduser(output_dir), max_iter, **settings)
        recipe = ModuleRecipe(student, teacher, plain, **parts)
    else:
        if not isinstance(teacher, str | Path):
            raise TypeError(
                f"The student is a config and the teacher a {type(teacher).__name__}; expected a "
                "name for the teacher as well."
            )
        line = ["--config-file", str(student), "--teacher", str(teacher), "--data", str(data)]
        args = argument_parser().parse_args(line)
        args.epochs, args.batch, args.resume = epochs, batch, resume
        folder = ("train.output_dir={}",) if is_lazy(str(student)) else ("OUTPUT_DIR", "{}")
        args.opts = [*(text.format(output_dir) for text in folder), *map(str, opts)]
        recipe = recipe_of(args, add_config, DistillTrainer)
    with contextlib.ExitStack() as stack:
        training = recipe.prepare(stack, resume=resume)
        training.train()
    return training


class ModuleRecipe(Recipe):
    """The parts of a training, from Python objects."""

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        settings: Settings,
        *,
        loader: Any,
        distillers: Sequence[Distiller],
        optimizer: torch.optim.Optimizer | None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None,
        evaluate: Callable[[nn.Module], Mapping[str, Any]] | None,
    ) -> None:
        """Args: see :func:`distill`."""
        self._student, self._teacher, self._settings = student, teacher, settings
        self._loader, self._distillers = loader, list(distillers) or [SSIMDistiller()]
        self._optimizer, self._scheduler, self._evaluate = optimizer, scheduler, evaluate
        self.folder = settings.output_dir
        self.teacher_names = [str(teacher)] if isinstance(teacher, str | Path) else []

    def settings(self) -> Settings:
        """The plain values."""
        return self._settings

    def set_up(self) -> None:
        """Logs and the seed."""
        for name in ("fvcore", "detectron2", "ssim_kd"):
            setup_logger(self.folder, distributed_rank=comm.get_rank(), name=name)
        if self._settings.seed >= 0:
            seed_all_rng(self._settings.seed + comm.get_rank())

    def training(self) -> Training:
        """Build all parts."""
        teacher = self._teacher
        if isinstance(teacher, str | Path):
            teacher = FrozenTeacher.load_from(str(teacher))
        model = DistilledDetector(
            student=self._student,
            teacher=teacher,
            distillers=self._distillers,
            max_iter=self._settings.max_iter,
        )
        model.to(next(self._student.parameters()).device)
        optimizer = self._with_distillers(model)
        scheduler = self._scheduler or functools.partial(ConstantLR, factor=1.0)
        names = [d.name for d in self._distillers]
        exact = isinstance(self._loader, TrainLoader)
        return Training(
            settings=self._settings,
            model=model,
            loader=self._loader,
            optimizer=optimizer,
            scheduler=scheduler(optimizer),
            evaluate=functools.partial(self._evaluation, self._student),
            # One whose place is its own.
            statistics_loader=lambda: copy.copy(self._loader) if exact else self._loader,
            pictures=self._pictures,
            config={**vars(self._settings), "distillers": names},
        )

    def _with_distillers(self, model: DistilledDetector) -> torch.optim.Optimizer:
        """The optimizer, of all that is trained."""
        main = self._optimizer
        if main is None:
            trained = [p for p in model.parameters() if p.requires_grad]
            main = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)
        known = {id(p) for group in main.param_groups for p in group["params"]}
        rest = [p for p in model.distillers.parameters() if id(p) not in known]
        if rest:
            main.add_param_group({"params": rest})
        base_lr = main.param_groups[0]["lr"]
        return add_groups(main, model, base_lr=base_lr, max_iter=self._settings.max_iter)

    def _evaluation(self, detector: nn.Module) -> Mapping[str, Any]:
        if self._evaluate is None:
            return {}
        with inference_context(detector), torch.no_grad():
            return self._evaluate(detector)

    def _pictures(self) -> list[dict[str, Any]]:
        if iter(self._loader) is self._loader:
            raise ValueError("the loader is an iterator, whose images are for the training")
        first = copy.copy(self._loader)
        if isinstance(first, TrainLoader):
            # The same after a resume.
            first.start_iter = 0
        return list(itertools.islice(next(iter(first)), 3))

    def teacher_weights(self) -> str:
        """The file of the teacher's weights."""
        found = self._teacher
        return source_of(str(found)).weights if isinstance(found, str | Path) else ""

    def evaluate_teacher(self) -> Mapping[str, Any]:
        """Evaluate the teacher on the student's data."""
        found = self._teacher
        if isinstance(found, str | Path):
            found, _ = source_of(str(found)).load()
            found.to(next(self._student.parameters()).device)
        if self._evaluate is None or not isinstance(found, nn.Module):
            raise ValueError(
                f"expected_ap is {self._settings.expected_ap:g}; expected `evaluate`, and the "
                "teacher as a name or a detector."
            )
        return self._evaluation(found)
