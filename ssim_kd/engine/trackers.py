"""Experiment trackers, MLflow and Weights & Biases, as writers beside TensorBoard's.

``TRACKING.WRITERS ("mlflow",)`` adds them to the trainer. In a trainer of one's own they stand
first, since TensorBoard's writer clears the pictures::

    class Trainer(DefaultTrainer):
        def build_writers(self):
            return [MLflowWriter(self.cfg), *super().build_writers()]
"""

import contextlib
import importlib.util
import json
import logging
import os
import queue
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
from detectron2.config import CfgNode, configurable
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage
from detectron2.utils.file_io import PathManager
from numpy.typing import NDArray

from .hooks import Accessory

logger = logging.getLogger(__name__)

#: In OUTPUT_DIR: the tracker's id of the run, by tracker.
TRACKED_RUNS = "tracked_runs.json"
#: Seconds that a tracker has at the end to take what is still on its way.
PATIENCE = 30.0

_KINDS = ("scalars", "pictures", "histograms")
# States of a run in MLflow's words.
_FINISHED, _KILLED, _FAILED = "FINISHED", "KILLED", "FAILED"


class TrackerWriter(EventWriter):
    """Gives a tracker the parameters once, then scalars, pictures and histograms by iteration.

    A thread talks to the tracker, so that no step waits for it. From the first error on it is left
    out, with one warning; the training goes on. The run in the tracker ends as the training does:
    finished, failed on an error, killed on SIGTERM. A training that is resumed goes on in the same
    run, whose id is in ``tracked_runs.json``.
    """

    #: As in ``TRACKING.WRITERS``; also the package and the extra.
    name: ClassVar[str]

    @configurable
    def __init__(
        self,
        *,
        folder: str,
        project: str = "",
        run_name: str = "",
        params: Mapping[str, Any] | None = None,
        window_size: int = 20,
    ) -> None:
        """
        Args:
            folder: of the training.
            project: "" for the tracker's own default.
            run_name: "" for the name of the folder.
            params: the config, nested or not.
            window_size: iterations that smoothed scalars are the median of.

        Raises:
            ValueError: the tracker's package is not installed.
        """
        check_package(self.name)
        self.folder, self.project = folder, project
        self.run_name = run_name or os.path.basename(os.path.abspath(folder))
        self.params = params or {}
        self._window_size = window_size
        self._accessory = Accessory(f"The tracker {self.name!r}")
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._last = dict.fromkeys(_KINDS, -1)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments that ``TRACKING`` and ``OUTPUT_DIR`` hold."""
        node = cfg.TRACKING
        run = {"project": node.PROJECT, "run_name": node.RUN_NAME}
        return {"folder": cfg.OUTPUT_DIR, "params": cfg, **run}

    def start(self, *, resume: bool) -> None:
        """Open the run in the tracker; the first :meth:`write` does so where nobody has.

        Args:
            resume: go on with the run that the folder names, if it names one.

        Raises:
            ValueError: the tracker cannot be reached or configured.
        """
        if self._thread is not None or self._closed:
            return
        path = os.path.join(self.folder, TRACKED_RUNS)
        runs = json.loads(_read(path)) if PathManager.isfile(path) else {}
        before = runs.get(self.name) if resume else None
        try:
            runs[self.name] = self._open(before)
        except Exception as error:
            which = f", run {before!r} of {path}," if before else ""
            raise ValueError(
                f"TRACKING.WRITERS names {self.name!r}, which cannot be used{which}: "
                f"{type(error).__name__}: {error} Expected {self.expected}; or leave it out."
            ) from error
        with PathManager.open(path, "w") as file:
            json.dump(runs, file)
        # An error that is being handled is none of this training's.
        self._handled = sys.exc_info()[1]
        self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
        self._thread.start()

    def write(self) -> None:
        """Hand over what is new in the storage."""
        storage = get_event_storage()
        with self._accessory.guard():
            if self._accessory.failed:
                return
            self.start(resume=_goes_on(storage))
            for iteration, found in self._new(storage):
                self._tasks.put(partial(self._log, iteration, **found))

    def close(self) -> None:
        """End the run: the state is that of the training, whose error is passing through here."""
        if self._thread is None or self._closed:
            return
        self._closed = True
        error = sys.exc_info()[1]
        self._state = _FINISHED
        if error is not None and error is not self._handled:
            killed = isinstance(error, SystemExit | KeyboardInterrupt)
            self._state = _KILLED if killed else _FAILED
        self._tasks.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            logger.warning(
                "The tracker %r did not take everything within %g s.", self.name, PATIENCE
            )

    def _work(self) -> None:
        for task in iter(self._tasks.get, None):
            if not self._accessory.failed:
                with self._accessory.guard():
                    task()
        with self._accessory.guard():
            self._end(self._state)

    def _new(self, storage: EventStorage) -> list[tuple[int, dict[str, dict[str, Any]]]]:
        """What was not written yet, by iteration and kind."""
        scalars = storage.latest_with_smoothing_hint(self._window_size).items()
        events: list[tuple[str, str, int, Any]] = [
            *(("scalars", name, i, float(value)) for name, (value, i) in scalars),
            # TensorBoard's writer clears these; a trainer may have none.
            *(("pictures", name, i, image) for name, image, i in storage._vis_data),
            *(("histograms", h["tag"], h["global_step"], h) for h in storage._histograms),
        ]
        found: dict[int, dict[str, dict[str, Any]]] = defaultdict(lambda: {k: {} for k in _KINDS})
        for kind, name, i, value in events:
            if i > self._last[kind]:
                found[i][kind][name] = value
        for kind, _, i, _ in events:
            self._last[kind] = max(self._last[kind], i)
        return sorted(found.items())

    #: What an error of :meth:`_open` asks for.
    expected: ClassVar[str]

    def _open(self, run_id: str | None) -> str:
        """Open a new run, with its parameters, or the one that is given; returns its id."""
        raise NotImplementedError

    def _log(
        self,
        iteration: int,
        *,
        scalars: Mapping[str, float],
        pictures: Mapping[str, Any],
        histograms: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Hand over what belongs to an iteration."""
        raise NotImplementedError

    def _end(self, state: str) -> None:
        raise NotImplementedError


class MLflowWriter(TrackerWriter):
    """MLflow, at ``MLFLOW_TRACKING_URI``; a project is an experiment there.

    It has no histograms.
    """

    name = "mlflow"
    expected = "MLFLOW_TRACKING_URI of a server that is reachable, or a store like sqlite:///FILE"

    def _open(self, run_id: str | None) -> str:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient
        from mlflow.tracking.context.registry import resolve_tags

        self._client = MlflowClient()
        with _few_retries():
            if run_id is not None:
                self._client.get_run(run_id)
                self._client.update_run(run_id, status="RUNNING")
                self._run_id = run_id
                return run_id
            name = self.project or os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            run = self._client.create_run(experiment, run_name=self.run_name, tags=resolve_tags())
            self._run_id = str(run.info.run_id)
            params = [Param(_plain(key), str(value)) for key, value in _leaves(self.params)]
            for first in range(0, len(params), 100):  # the most that MLflow takes at once
                self._client.log_batch(self._run_id, params=params[first : first + 100])
            return self._run_id

    def _log(self, iteration: int, *, scalars: Any, pictures: Any, histograms: Any) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(_plain(name), x, now, iteration) for name, x in scalars.items()]
        if values:
            self._client.log_batch(self._run_id, metrics=values)
        for name, image in pictures.items():
            self._client.log_image(self._run_id, _picture(image), key=_plain(name), step=iteration)

    def _end(self, state: str) -> None:
        self._client.set_terminated(self._run_id, state)


class WandbWriter(TrackerWriter):
    """Weights & Biases, by its own variables: ``WANDB_MODE``, ``WANDB_ENTITY``, ``WANDB_API_KEY``.

    Its files are in the folder of the training, below "wandb".
    """

    name = "wandb"
    expected = "a login (`wandb login`, WANDB_API_KEY), or WANDB_MODE=offline"

    def _open(self, run_id: str | None) -> str:
        import wandb

        # A server that is gone would keep the program from its end.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(PATIENCE))
        self._run = wandb.init(
            project=self.project or None,
            name=self.run_name,
            id=run_id,
            resume="allow" if run_id else None,
            dir=self.folder,
            config=None if run_id else dict(_leaves(self.params)),
        )
        return str(self._run.id)

    def _log(self, iteration: int, *, scalars: Any, pictures: Any, histograms: Any) -> None:
        import wandb

        # Steps that a resumed training makes again, bit for bit.
        if iteration < self._run.step:
            return
        values = dict(scalars)
        values |= {name: wandb.Image(_picture(image)) for name, image in pictures.items()}
        for name, found in histograms.items():
            edges = np.array([found["min"], *found["bucket_limits"]])
            counts = np.array(found["bucket_counts"])
            values[name] = wandb.Histogram(np_histogram=(counts, edges))
        self._run.log(values, step=iteration)

    def _end(self, state: str) -> None:
        if state == _KILLED:
            self._run.mark_preempting()
        self._run.finish(exit_code={_FINISHED: 0, _KILLED: 143}.get(state, 1))


#: Writers by their name in ``TRACKING.WRITERS``.
TRACKERS: dict[str, type[TrackerWriter]] = {w.name: w for w in (MLflowWriter, WandbWriter)}


def build_trackers(cfg: CfgNode) -> list[TrackerWriter]:
    """The writers of ``TRACKING.WRITERS``.

    Raises:
        ValueError: as :func:`check_trackers`.
    """
    check_trackers(cfg)
    return [TRACKERS[name](cfg) for name in cfg.TRACKING.WRITERS]


def check_trackers(cfg: CfgNode) -> None:
    """Check that the trackers of a config are known and installed.

    Raises:
        ValueError: naming the key, its value and what is expected.
    """
    for name in cfg.TRACKING.WRITERS:
        if name not in TRACKERS:
            raise ValueError(
                f"TRACKING.WRITERS is {cfg.TRACKING.WRITERS!r}; expected names of "
                f"{sorted(TRACKERS)}, e.g. ('mlflow',)."
            )
        check_package(name)


def check_package(name: str) -> None:
    """Raise ValueError if a tracker's package is not installed."""
    if importlib.util.find_spec(name) is None:
        raise ValueError(
            f"TRACKING.WRITERS names {name!r}, whose package is not installed; expected it: "
            f"pip install 'ssim_kd[{name}]'."
        )


def _goes_on(storage: EventStorage) -> bool:
    """Whether the training did not begin at its first iteration."""
    histories = storage.histories()
    name = "total_loss" if "total_loss" in histories else next(iter(histories), "")
    return bool(name) and histories[name].values()[0][1] > 0


def _read(path: str) -> str:
    with PathManager.open(path) as file:
        return str(file.read())


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested config by dotted name; what is no value of JSON as text."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, str | int | float | list | tuple | None)
            yield f"{prefix}{key}", value if plain else str(value)


def _picture(image: Any) -> NDArray[np.uint8]:
    """(3, H, W) of TensorBoard, uint8 or in [0, 1], as (H, W, 3) uint8."""
    array = np.asarray(image).transpose(1, 2, 0)
    if array.dtype != np.uint8:
        array = (array.clip(0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(array)


def _plain(name: str) -> str:
    """A name without the characters that MLflow refuses."""
    return re.sub(r"[^\w\-. /]", "_", name)


@contextlib.contextmanager
def _few_retries() -> Iterator[None]:
    """Inside, MLflow gives up on a server after seconds; by default after minutes."""
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    before = os.environ.get(name)
    os.environ[name] = before or "2"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
