"""Trainings of the demo, each in its own process, with their progress on the console."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.config import CfgNode

from ssim_kd.metrics_file import Series, read_metrics

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

    period: float = 10.0  # in seconds, if lines cannot be rewritten
    terminal: bool = field(default_factory=lambda: sys.stdout.isatty())
    _last: float = 0.0

    def step(self, text: str) -> None:
        """Announce a step."""
        self._last = 0.0
        print(text, flush=True)

    def progress(self, text: str) -> None:
        """Show the step's progress."""
        if self.terminal:
            print(f"\r\033[K  {text}", end="", flush=True)
        elif time.monotonic() - self._last >= self.period:
            self._last = time.monotonic()
            print(f"  {text}", flush=True)

    def done(self, text: str) -> None:
        """Close the step."""
        print(f"{chr(13)}{chr(27)}[K  {text}" if self.terminal else f"  {text}", flush=True)


@dataclass(frozen=True)
class Job:
    """A training with what it is called with.

    Attributes:
        training: what to train.
        cfg: the config that comes of ``options``.
        options: KEY VALUE ... for train_net.py.
        folder: of its results.
    """

    training: Training
    cfg: CfgNode
    options: list[str]
    folder: Path

    @property
    def log(self) -> Path:
        """All that the training prints."""
        return self.folder / "console.txt"


def train(
    jobs: Sequence[Job],
    console: Console,
    *,
    resume: bool,
    script: Path = ROOT / "train_net.py",
) -> None:
    """Train and evaluate at the same time, each in its own process.

    Args:
        jobs: do not need each other.
        console: shows the progress.
        resume: keep what is finished and continue what was stopped; else start anew.
        script: train_net.py.

    Raises:
        StepError: a process failed; the message holds the end of its log.
    """
    running: dict[str, subprocess.Popen] = {}
    try:
        for job in jobs:
            process = start(job, len(jobs), resume=resume, script=script)
            if process is None:
                console.done(f"{job.training.title}: kept, it is finished")
            else:
                running[job.training.key] = process
        while running:
            for job in jobs:
                process = running.get(job.training.key)
                if process is not None and process.poll() is not None:
                    finish(job, process.returncode, console)
                    del running[job.training.key]
            if running:
                left = [job for job in jobs if job.training.key in running]
                console.progress("  |  ".join(map(progress_of, left)))
                time.sleep(0.5)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def start(job: Job, at_once: int, *, resume: bool, script: Path) -> subprocess.Popen | None:
    """Start a training, or return None if it is finished."""
    settings = fingerprint(job.cfg)
    marker = job.folder / "demo_settings.json"
    resume = resume and marker.is_file() and json.loads(marker.read_text()) == settings
    if resume and results_of(job.folder) and (job.folder / "model_final.pth").is_file():
        return None
    if not resume:
        shutil.rmtree(job.folder, ignore_errors=True)
        job.folder.mkdir(parents=True)
        marker.write_text(json.dumps(settings))
    command = [sys.executable, str(script), "--config-file", str(CONFIGS / job.training.config)]
    command += ["--resume"] if resume else []
    # Trainings that run at once share the cores.
    threads = str(max((os.cpu_count() or 1) // at_once, 1))
    with open(job.log, "a") as file:
        # In a new session: Ctrl-C reaches only this process, which then asks the training to save
        # and end.
        return subprocess.Popen(
            command + job.options,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env={"OMP_NUM_THREADS": threads, **os.environ},
            start_new_session=True,
        )


def finish(job: Job, status: int, console: Console) -> None:
    """Report a training whose process has ended."""
    results = results_of(job.folder)
    if status != 0 or results is None:
        raise StepError(
            f"The {job.training.title}'s training failed with exit status {status}. "
            f"The end of {job.log}:\n\n{tail(job.log)}"
        )
    values = "  ".join(f"{name} {results[name]:.1f}" for name in METRICS)
    console.done(f"{job.training.title}: {values}")


def progress_of(job: Job) -> str:
    """The progress of a training, e.g. "teacher 20/1200, loss 1.250, 1:23 left"."""
    iterations = job.cfg.SOLVER.MAX_ITER
    series = series_of(job.folder)
    if "total_loss" not in series:
        return f"{job.training.title} starts"
    iteration, loss = series["total_loss"].pairs()[-1]
    if iteration + 1 >= iterations:
        return f"{job.training.title} is evaluated"
    left = int(series["eta_seconds"].values[-1]) if "eta_seconds" in series else 0
    return (
        f"{job.training.title} {iteration + 1}/{iterations}, "
        f"loss {loss:.3f}, {left // 60}:{left % 60:02d} left"
    )


def series_of(folder: Path) -> dict[str, Series]:
    """The metrics of a training so far."""
    try:
        return read_metrics(folder).series
    except OSError:
        return {}


def results_of(folder: Path) -> dict[str, float] | None:
    """The metrics of the evaluation, 0 to 100, or None before there is one."""
    series = series_of(folder)
    if "bbox/AP" not in series:
        return None
    return {name: series[f"bbox/{name}"].values[-1] for name in METRICS}


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
