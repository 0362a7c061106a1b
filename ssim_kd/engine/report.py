"""What a training leaves for its report, and the report at its end."""

import importlib
import importlib.util
import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info

from ..data.coco import annotation_files
from ..run_file import write_run_file
from .settings import Settings

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parents[1]


def log_version() -> None:
    """Log the version of ssim_kd, its commit and the command."""
    logger.info("ssim_kd %s, commit %s.", _version(), commit() or "none: no checkout")
    logger.info("Command: %s", _command())


def write_run(settings: Settings, *, seed: int, teacher: Any, sha256: str) -> None:
    """Write ``run.json`` as a training starts; see :func:`ssim_kd.run_file.read_run_file`.

    Args:
        settings: of the training.
        seed: that was drawn or given.
        teacher: a :class:`FrozenTeacher`; None without.
        sha256: of its weights.
    """
    # Detectron2's table, without its rulers and the folders of packages.
    pairs = re.findall(r"^([^\s-].*?) {2,}(\S.*?)(?: @\S+)? *$", collect_env_info(), re.M)
    facts: dict[str, Any] = {
        "ssim_kd": _version(),
        "commit": commit(),
        "command": _command(),
        "config": settings.language,
        "seed": seed,
        "weights": settings.weights,
        "test_sets": {n: files for n in settings.test_sets if (files := annotation_files(n))},
        "environment": dict(pairs),
        "teacher": None,
    }
    if teacher is not None:
        source = teacher.source
        named = {"name": source.name, "weights": source.weights} if source else {}
        facts["teacher"] = {**named, "sha256": sha256}
    write_run_file(settings.output_dir, facts)


def _version() -> str:
    # By name: the package's own names are those of its parts, and an import would be a circle.
    version: str = importlib.import_module(__name__.partition(".")[0]).__version__
    return version


def _command() -> str:
    # Processes that were spawned have the arguments of the one that did it.
    python = ["python"] if sys.argv[0].endswith(".py") else []
    return shlex.join([*python, *sys.argv])


def commit() -> str:
    """The commit of the checkout that is run, with "+" if files in it have changed; else ""."""
    # Not the one of a repository that merely has an environment with ssim_kd inside.
    top = _git("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != _PACKAGE.parent:
        return ""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return _git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_PACKAGE), *arguments]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def write_report(output_dir: str) -> None:
    """Write ``report.html`` into the folder of a finished training, in the main process.

    A failure is one line of the log: the training is over and well.
    """
    if not comm.is_main_process():
        return
    path = Path(output_dir, "report.html")
    if torch.cuda.is_initialized():
        write_run_file(output_dir, {"peak_memory_mb": torch.cuda.max_memory_allocated() >> 20})
    if importlib.util.find_spec("jinja2") is None:
        logger.info("%s is not written: pip install 'ssim_kd[report]' for it.", path)
        return
    if "://" in output_dir:
        logger.info("%s is not written: OUTPUT_DIR is not on this machine.", path)
        return
    try:
        from ..reporting import write_report as write

        write([Path(output_dir)], path)
    except Exception as error:
        logger.error("%s was not written: %s: %s", path, type(error).__name__, error)
    else:
        logger.info("Report: %s", path)
