"""What the writers of all trackers share."""

import contextlib
import importlib.util
import json
import logging
import os
import queue
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
from detectron2.config import CfgNode, configurable
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage
from detectron2.utils.file_io import PathManager
from numpy.typing import NDArray

from ..sharing import without_queries
from ..writing import write_atomically
from ..yaml_files import dotted, name_of

logger = logging.getLogger(__name__)

#: In OUTPUT_DIR: the tracker's id of the run, by tracker.
TRACKED_RUNS = "tracked_runs.json"
#: Seconds that a tracker has at the end to take what is still on its way.
PATIENCE = 30.0

_KINDS = ("scalars", "pictures", "histograms")
# States of a run in MLflow's words.
FINISHED, KILLED, FAILED = "FINISHED", "KILLED", "FAILED"


class Accessory:
    """What a training goes on without: an error is reported once, and nothing is tried again."""

    def __init__(self, name: str) -> None:
        """
        Args:
            name: for the warning.
        """
        self.name = name
        self.failed = False

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Inside, an error is a warning."""
        try:
            yield
        except Exception as error:
            self.failed = True
            logger.warning(
                "%s failed and is left out from here on; the training goes on. %s: %s",
                *(self.name, type(error).__name__, error),
            )


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
        self.params = without_queries(params or {})
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
        """Open the run in the tracker, unless it is; else the first :meth:`write` does.

        Args:
            resume: go on with the run that the folder names, if it names one.

        Raises:
            ValueError: the tracker cannot be reached or configured.
        """
        if self._thread is not None or self._closed:
            return
        path = os.path.join(self.folder, TRACKED_RUNS)
        runs = _read_runs(path)
        before = runs.get(self.name) if resume else None
        try:
            runs[self.name] = self._open(before)
        except Exception as error:
            which = f", run {before!r} of {path}," if before else ""
            raise ValueError(
                f"TRACKING.WRITERS names {self.name!r}, which cannot be used{which}: "
                f"{type(error).__name__}: {error} Expected {self.expected}; or leave it out."
            ) from error
        write_atomically(path, lambda file: file.write(json.dumps(runs).encode()))
        # Ignore an exception that was already being handled when training began.
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
        self._state = FINISHED
        if error is not None and error is not self._handled:
            killed = isinstance(error, SystemExit | KeyboardInterrupt)
            self._state = KILLED if killed else FAILED
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


def _read_runs(path: str) -> dict[str, str]:
    if not PathManager.isfile(path):
        return {}
    try:
        with PathManager.open(path) as file:
            return dict(json.load(file))
    except (ValueError, TypeError, RecursionError) as error:
        logger.warning("%s cannot be read (%s): the trackers get new runs.", path, error)
        return {}


def parameters(node: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a nested config by dotted name; what JSON has no type for as text."""
    plain = str | int | float | list | tuple | None
    return {k: v if isinstance(v, plain) else name_of(v) for k, v in dotted(node)}


def picture(image: Any) -> NDArray[np.uint8]:
    """(3, H, W) of TensorBoard, uint8 or in [0, 1], as (H, W, 3) uint8."""
    array = np.asarray(image).transpose(1, 2, 0)
    if array.dtype != np.uint8:
        array = (array.clip(0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(array)
