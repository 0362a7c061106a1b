"""One training of the demo, in a process of its own, with its progress on the console."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.config import CfgNode

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "Digits-Detection"
METRICS = ("AP", "AP50", "AP75")


@dataclass(frozen=True)
class Training:
    """One of the three trainings: its key in summary.json, its title, its config."""

    key: str
    title: str
    config: str


class StepError(RuntimeError):
    """A step failed; the message holds what the user needs to see."""


@dataclass
class Console:
    """Short progress: one line that is rewritten on a terminal, a line now and then elsewhere."""

    period: float = 10.0  # in seconds, where lines cannot be rewritten
    terminal: bool = field(default_factory=lambda: sys.stdout.isatty())
    _last: float = 0.0

    def step(self, text: str) -> None:
        """Announce a step."""
        self._last = 0.0
        print(text, flush=True)

    def progress(self, text: str) -> None:
        """Show where the step is."""
        if self.terminal:
            print(f"\r\033[K  {text}", end="", flush=True)
        elif time.monotonic() - self._last >= self.period:
            self._last = time.monotonic()
            print(f"  {text}", flush=True)

    def done(self, text: str) -> None:
        """Close the step."""
        print(f"{chr(13)}{chr(27)}[K  {text}" if self.terminal else f"  {text}", flush=True)


def train(
    training: Training,
    cfg: CfgNode,
    options: list[str],
    folder: Path,
    console: Console,
    *,
    resume: bool,
    script: Path = ROOT / "train_net.py",
) -> None:
    """Train and evaluate in a process of its own.

    Args:
        training: what to train.
        cfg: the config that comes of ``options``.
        options: KEY VALUE ... for train_net.py.
        folder: of its results.
        console: shows the progress.
        resume: keep what is finished, and go on where it stopped; else start anew.
        script: train_net.py.

    Raises:
        StepError: the process failed; the message holds the end of its log.
    """
    settings = fingerprint(cfg)
    marker = folder / "demo_settings.json"
    resume = resume and marker.is_file() and json.loads(marker.read_text()) == settings
    if resume and results_of(folder) is not None and (folder / "model_final.pth").is_file():
        console.done("kept: it is finished")
        return
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        marker.write_text(json.dumps(settings))
    command = [sys.executable, str(script), "--config-file", str(CONFIGS / training.config)]
    command += ["--resume"] if resume else []
    command += options
    log = folder / "console.txt"
    with open(log, "a") as file:
        # In a session of its own: an interrupt from the keyboard reaches this process alone, which
        # then asks the training to save and end.
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            watch(process, folder, cfg.SOLVER.MAX_ITER, console)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    results = results_of(folder)
    if process.returncode != 0 or results is None:
        raise StepError(
            f"The {training.title}'s training failed with exit status {process.returncode}. "
            f"The end of {log}:\n\n{tail(log)}"
        )
    console.done("  ".join(f"{name} {results[name]:.1f}" for name in METRICS))


def watch(process: subprocess.Popen, folder: Path, iterations: int, console: Console) -> None:
    """Show the progress of a training until its process ends."""
    while process.poll() is None:
        rows = read_metrics(folder)
        losses = [row for row in rows if "total_loss" in row]
        if not losses:
            console.progress("starting")
        elif losses[-1]["iteration"] + 1 >= iterations:
            console.progress("evaluating")
        else:
            row = losses[-1]
            left = int(row.get("eta_seconds", 0))
            console.progress(
                f"iteration {row['iteration'] + 1}/{iterations}  loss {row['total_loss']:.3f}  "
                f"{left // 60}:{left % 60:02d} left"
            )
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            continue


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.json that are whole."""
    path = folder / "metrics.json"
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # being written
    return rows


def results_of(folder: Path) -> dict[str, float] | None:
    """The metrics of the evaluation, 0 to 100, or None before there is one."""
    for row in reversed(read_metrics(folder)):
        if "bbox/AP" in row:
            return {name: row[f"bbox/{name}"] for name in METRICS}
    return None


def fingerprint(cfg: CfgNode) -> dict[str, str]:
    """What a training depends on: its config, and its teacher's weights."""
    found = {"config": hashlib.sha256(cfg.dump().encode()).hexdigest()}
    weights = Path(cfg.MODEL.DISTILL.TEACHER.WEIGHTS)
    if cfg.MODEL.DISTILL.ENABLED and weights.is_file():
        found["teacher"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    return found


def tail(path: Path, lines: int = 20) -> str:
    """The last lines of a file."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
