"""Weights & Biases."""

import os
from typing import Any

import numpy as np

from .writer import FINISHED, KILLED, PATIENCE, TrackerWriter, parameters, picture

#: Axis of the values in a run whose steps are the user's.
ITERATION = "iteration"


class WandbWriter(TrackerWriter):
    """Weights & Biases, by its own variables: ``WANDB_MODE``, ``WANDB_ENTITY``, ``WANDB_API_KEY``.

    Its files are in the folder of the training, below "wandb". The run that the program has open is
    used instead of a new one, with the iterations as :data:`ITERATION`, and stays open.
    """

    name = "wandb"
    expected = "a login (`wandb login`, WANDB_API_KEY), or WANDB_MODE=offline"

    def _open(self, run_id: str | None) -> str:
        import wandb

        # A server that is gone would keep the program from its end.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(PATIENCE))
        self._is_users = wandb.run is not None
        config = None if run_id else parameters(self.params)
        if wandb.run is not None:
            self._axes: set[str] = set()
            self._run = wandb.run
            self._run.config.update(config or {}, allow_val_change=True)
        else:
            self._run = wandb.init(
                project=self.project or None,
                name=self.run_name,
                id=run_id,
                resume="allow" if run_id else None,
                dir=self.folder,
                config=config,
            )
        return str(self._run.id)

    def _log(self, iteration: int, *, scalars: Any, pictures: Any, histograms: Any) -> None:
        import wandb

        # Steps that a resumed training makes again, bit for bit.
        if not self._is_users and iteration < self._run.step:
            return
        values = dict(scalars)
        values |= {name: wandb.Image(picture(image)) for name, image in pictures.items()}
        for name, found in histograms.items():
            edges = np.array([found["min"], *found["bucket_limits"]])
            counts = np.array(found["bucket_counts"])
            values[name] = wandb.Histogram(np_histogram=(counts, edges))
        if not self._is_users:
            self._run.log(values, step=iteration)
            return
        # The steps are the user's: W&B drops values of an earlier one.
        for name in values.keys() - self._axes:
            self._run.define_metric(name.replace("*", "\\*"), step_metric=ITERATION)
        self._axes |= values.keys()
        self._run.log({**values, ITERATION: iteration})

    def _end(self, state: str) -> None:
        if self._is_users:
            return
        if state == KILLED:
            self._run.mark_preempting()
        self._run.finish(exit_code={FINISHED: 0, KILLED: 143}.get(state, 1))
