"""MLflow."""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator
from typing import Any

from .writer import TrackerWriter, parameters, picture

# Of a name in MLflow.
_LONGEST = 250


class MLflowWriter(TrackerWriter):
    """MLflow, at ``MLFLOW_TRACKING_URI``; a project is an experiment there.

    It follows MLflow's own rules: the run that the program has open, which stays open; else that of
    ``MLFLOW_RUN_ID``; else a new one in the experiment of the project, of
    ``mlflow.set_experiment``, ``MLFLOW_EXPERIMENT_ID`` or ``MLFLOW_EXPERIMENT_NAME``.

    It has no histograms.
    """

    name = "mlflow"
    expected = "MLFLOW_TRACKING_URI of a server that is reachable, or a store like sqlite:///FILE"

    def _open(self, run_id: str | None) -> str:
        import mlflow

        self._client = mlflow.MlflowClient()
        self._names: dict[str, str] = {}
        opened = mlflow.active_run()
        self._is_users = opened is not None
        with _few_retries():
            run_id = (opened and opened.info.run_id) or run_id or os.environ.get("MLFLOW_RUN_ID")
            known = {}
            if run_id:
                known = self._client.get_run(run_id).data.params
                self._client.update_run(run_id, status="RUNNING")
            self._run_id = run_id or self._create()
            params = [
                mlflow.entities.Param(self._named(key), str(value))
                for key, value in parameters(self.params).items()
                if self._named(key) not in known  # cannot change
            ]
            for first in range(0, len(params), 100):  # the most that MLflow takes at once
                self._client.log_batch(self._run_id, params=params[first : first + 100])
        return self._run_id

    def _create(self) -> str:
        from mlflow.tracking.context.registry import resolve_tags

        # MLflow's own rule has no public name.
        from mlflow.tracking.fluent import _get_experiment_id

        if self.project:
            found = self._client.get_experiment_by_name(self.project)
            experiment = found.experiment_id if found else None
            experiment = experiment or self._client.create_experiment(self.project)
        else:
            experiment = _get_experiment_id()
        run = self._client.create_run(str(experiment), run_name=self.run_name, tags=resolve_tags())
        return str(run.info.run_id)

    def _log(self, iteration: int, *, scalars: Any, pictures: Any, histograms: Any) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(self._named(name), x, now, iteration) for name, x in scalars.items()]
        for first in range(0, len(values), 1000):  # the most that MLflow takes at once
            self._client.log_batch(self._run_id, metrics=values[first : first + 1000])
        for name, image in pictures.items():
            key = self._named(name)
            self._client.log_image(self._run_id, picture(image), key=key, step=iteration)

    def _end(self, state: str) -> None:
        if not self._is_users:
            self._client.set_terminated(self._run_id, state)

    def _named(self, name: str) -> str:
        """A name that MLflow takes: no path with odd parts, not too long, one for each name."""
        if name not in self._names:
            plain = re.sub(r"[^\w\-. /]", "_", name)
            plain = "/".join("_" if part in ("", ".", "..") else part for part in plain.split("/"))
            if len(plain) > _LONGEST or plain in self._names.values():
                digest = hashlib.sha256(name.encode()).hexdigest()[:8]
                plain = f"{plain[: _LONGEST - 9]}-{digest}"
            self._names[name] = plain
        return self._names[name]


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
