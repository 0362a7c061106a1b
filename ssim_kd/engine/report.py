"""What a training leaves for its report, and the report at its end."""

import importlib
import importlib.util
import logging
import shlex
import subprocess
import sys
from pathlib import Path

from detectron2.utils import comm

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parents[1]


def log_version() -> None:
    """Log the version of ssim_kd, its commit and the command, which the report reads."""
    # By name: the package's own names are those of its parts, and an import would be a circle.
    version = importlib.import_module(__name__.partition(".")[0]).__version__
    logger.info("ssim_kd %s, commit %s.", version, commit() or "none: no checkout")
    # Processes that were spawned have the arguments of the one that did it.
    python = ["python"] if sys.argv[0].endswith(".py") else []
    logger.info("Command: %s", shlex.join([*python, *sys.argv]))


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
