"""Trainings through submitit: several at once here, or an array of SLURM."""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from ..writing import write_atomically
from .measuring import measure
from .records import Records
from .study import TEACHER, Run, flattened

logger = logging.getLogger(__name__)

#: The folder that ssim_kd is imported from: a checkout, or that of the installed packages.
ROOT = Path(__file__).resolve().parents[2]
REQUEST, MEASURED, FINISHED = "request.json", "measured.json", "finished"
CONSOLE = "console.txt"
_META = "MODEL.META_ARCHITECTURE"
# Keys with paths that may be relative to the study.
_PATHS = (TEACHER, "DATASETS.DATA_FILE", "MODEL.WEIGHTS")


class TrainingError(RuntimeError):
    """Trainings failed; the message names their logs."""


@dataclass(frozen=True)
class Place:
    """Where trainings run.

    Attributes:
        output: folder of their folders.
        executor: submits them.
        workers: how many at once; 0 leaves that to the executor.
        opts: overrides that change nothing but speed or place, e.g. MODEL.DEVICE.
        small_box: area in pixels below which a box counts as small.
    """

    output: Path
    executor: submitit.Executor
    workers: int
    opts: Mapping[str, Any]
    small_box: float


def build_executor(
    cluster: str,
    folder: Path,
    workers: int,
    parameters: Mapping[str, Any],
    *,
    max_timeouts: int = 3,
) -> submitit.Executor:
    """An executor whose jobs have time enough, on this machine ("local") or on SLURM.

    Args:
        cluster: "local" or "slurm".
        folder: of submitit's logs and requests.
        workers: jobs at once on SLURM; 0 leaves that to it.
        parameters: of submitit; text that is a number becomes one.
        max_timeouts: how often a job that can resume is queued again after its time limit.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    limit = {f"{cluster}_max_num_timeout": max_timeouts}
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster, **limit)
    numbers = {name: int(text) for name, text in parameters.items() if str(text).isdigit()}
    executor.update_parameters(**{"timeout_min": 24 * 60, **parameters, **numbers})
    if cluster == "slurm" and workers:
        executor.update_parameters(slurm_array_parallelism=workers)
    return executor


def finish(runs: Sequence[Run], models: Mapping[str, Run], records: Records, place: Place) -> None:
    """Train those that have no record, after the models that they need.

    Raises:
        TrainingError: some failed; the others are finished and recorded.
    """
    missing = records.missing(runs)
    needed: list[Run] = []

    def need(run: Run) -> None:
        for name in (run.start, run.teacher):
            if name:
                need(models[name])
                there = records.of(models[name]) and _weights(models[name], place).is_file()
                if not there and models[name] not in needed:
                    needed.append(models[name])

    for run in missing:
        need(run)
    # A model may start from another one.
    for run in needed:
        _train_all([run], models, records, place)
    _train_all([run for run in missing if run not in needed], models, records, place)


def _train_all(
    runs: Sequence[Run], models: Mapping[str, Run], records: Records, place: Place
) -> None:
    waiting, failed, ended = list(runs), [], 0
    jobs: dict[str, tuple[Run, submitit.Job[dict[str, Any]]]] = {}
    try:
        while waiting or jobs:
            room = len(waiting) if not place.workers else place.workers - len(jobs)
            if waiting and room > 0:
                with place.executor.batch():
                    for run in waiting[:room]:
                        jobs[run.key] = (run, _submit(run, models, records, place))
                        logger.info("%s: begins in %s", run.key, place.output / run.key)
                waiting = waiting[room:]
            for key, (run, job) in list(jobs.items()):
                if not job.done():
                    continue
                del jobs[key]
                error = job.exception() or job.result().get("failed")
                ended += 1
                if error is not None:
                    failed.append(f"{key}: {error}")
                    logger.error("(%d of %d) Failed: %s", ended, len(runs), failed[-1])
                    continue
                _record(run, job.result(), records, f"({ended} of {len(runs)}) ")
            time.sleep(0.2)
    finally:
        for _, job in jobs.values():
            job.cancel()
    if failed:
        raise TrainingError(f"{len(failed)} trainings failed:\n" + "\n".join(failed))


def _record(run: Run, found: Mapping[str, Any], records: Records, progress: str) -> None:
    before = records.of(run)
    if before and before["weights_sha256"] != found["measured"]["weights_sha256"]:
        # Another processor rounds differently. Who learned from it has its hash in its record.
        logger.warning("%s was trained anew and is not bit for bit what it was.", run.key)
    records.add(run, found["measured"], found["machine"])
    logger.info("%s%s: AP %.2f", progress, run.key, found["measured"]["metrics"]["AP"])


def _weights(run: Run, place: Place) -> Path:
    return place.output / run.key / "model_final.pth"


def overrides(run: Run, models: Mapping[str, Run], place: Place) -> dict[str, Any]:
    """The KEY VALUE pairs of a training."""
    opts = {**run.opts, "SEED": run.seed, "OUTPUT_DIR": str(place.output / run.key), **place.opts}
    for key in _PATHS:
        path = run.folder / str(opts.get(key, ""))
        if key in opts and path.exists():
            opts[key] = str(path.resolve())
    if run.start:
        opts["MODEL.WEIGHTS"] = str(_weights(models[run.start], place))
    if run.teacher:
        opts[TEACHER] = str(models[run.teacher].config)
        opts["MODEL.DISTILL.TEACHER.WEIGHTS"] = str(_weights(models[run.teacher], place))
    # A stock config becomes a student; and a student's config is the control without a teacher.
    architecture = flattened(run.config).get(_META, "GeneralizedRCNN")
    if not opts.get(TEACHER):
        opts.setdefault("MODEL.DISTILL.ENABLED", False)
    elif architecture != "DistilledDetector":
        opts.setdefault(_META, "DistilledDetector")
        opts.setdefault("MODEL.DISTILL.STUDENT_META_ARCHITECTURE", architecture)
    return opts


def _submit(
    run: Run, models: Mapping[str, Run], records: Records, place: Place
) -> submitit.Job[dict[str, Any]]:
    folder = place.output / run.key
    opts = overrides(run, models, place)
    command = [sys.executable, *([run.script] if run.script else ["-m", "ssim_kd"])]
    request = {
        "key": run.key,
        "fingerprint": run.fingerprint,
        "command": [*command, "--config-file", str(run.config), "--resume"],
        "opts": [str(part) for pair in opts.items() for part in pair],
        "teacher_sha256": _recorded_hash(run.teacher, models, records),
        "small_box": place.small_box,
        # Relative paths of configs begin there.
        "cwd": str(Path.cwd()),
    }
    return place.executor.submit(_attempt, request, str(folder))


def _recorded_hash(name: str, models: Mapping[str, Run], records: Records) -> str:
    record = records.of(models[name]) if name else None
    return record["weights_sha256"] if record else ""


def _attempt(request: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """:func:`train`; what failed is returned, without the trace of this process."""
    try:
        return train(request, folder)
    except TrainingError as error:
        return {"failed": str(error)}


def train(request: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Run one training in its own process, or continue one that was stopped.

    Returns:
        what :func:`~.measuring.measure` measures of it, and the machine it ran on.

    Raises:
        TrainingError: it failed.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    asked, done = out / REQUEST, out / FINISHED
    if not asked.is_file() and any(out.iterdir()):
        raise TrainingError(
            f"{out} holds files that no study has put there: expected an empty folder, or none. "
            "Move it away, or name another --output."
        )
    if read_json(asked).get("fingerprint") != request["fingerprint"]:
        shutil.rmtree(out)
        out.mkdir()
    write_atomically(str(asked), lambda file: file.write(json.dumps(dict(request)).encode()))
    if not done.is_file():
        _call([*request["command"], *request["opts"]], out, request["cwd"])
        done.touch()
    measured = read_json(out / MEASURED) or {"running": 1}
    if measured.pop("running", 0):
        # An attempt was killed together with the process that measures.
        measured |= {"seconds": None, "cpu_seconds": None}
    return measure(out, request, measured)


def read_json(path: Path) -> dict[str, Any]:
    """What a file holds; {} if it is missing, empty or cut."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def _call(command: Sequence[str], out: Path, cwd: str) -> None:
    started = time.monotonic()
    before = read_json(out / MEASURED)
    _write(out, {**before, "running": before.get("running", 0) + 1})
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(out / CONSOLE, "a") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=environment,
            # A Ctrl-C reaches this process, which then asks the training to save.
            start_new_session=True,
        )
        # Whoever ends this process ends the training, which then saves.
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the tool was stopped
            process.terminate()
            process.wait()
            raise
        finally:
            _add_usage(out, time.monotonic() - started)
    if status != 0:
        lines = (out / CONSOLE).read_text(errors="replace").strip().splitlines() or [""]
        raise TrainingError(f"{lines[-1]} (exit status {status}, see {out / CONSOLE})")


def _add_usage(out: Path, seconds: float) -> None:
    """Add what this process's child took to what earlier attempts at the same training took."""
    before = read_json(out / MEASURED)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    now = {
        "running": before.get("running", 1) - 1,
        "seconds": round(before.get("seconds", 0) + seconds, 1),
        "cpu_seconds": round(before.get("cpu_seconds", 0) + used.ru_utime + used.ru_stime, 1),
        "peak_memory_mb": max(before.get("peak_memory_mb") or 0, round(used.ru_maxrss / 1024)),
    }
    _write(out, now)


def _write(out: Path, measured: Mapping[str, Any]) -> None:
    text = json.dumps(measured).encode()
    write_atomically(str(out / MEASURED), lambda file: file.write(text))
