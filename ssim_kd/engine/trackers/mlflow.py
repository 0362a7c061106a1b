"""MLflow."""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from typing import Any

from .writer import TrackerWriter, leaves, picture


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
            params = [Param(_plain(key), str(value)) for key, value in leaves(self.params)]
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
            self._client.log_image(self._run_id, picture(image), key=_plain(name), step=iteration)

    def _end(self, state: str) -> None:
        self._client.set_terminated(self._run_id, state)


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
