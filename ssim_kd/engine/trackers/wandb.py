"""Weights & Biases."""

import os
from typing import Any

import numpy as np

from .writer import FINISHED, KILLED, PATIENCE, TrackerWriter, leaves, picture


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
            config=None if run_id else dict(leaves(self.params)),
        )
        return str(self._run.id)

    def _log(self, iteration: int, *, scalars: Any, pictures: Any, histograms: Any) -> None:
        import wandb

        # Steps that a resumed training makes again, bit for bit.
        if iteration < self._run.step:
            return
        values = dict(scalars)
        values |= {name: wandb.Image(picture(image)) for name, image in pictures.items()}
        for name, found in histograms.items():
            edges = np.array([found["min"], *found["bucket_limits"]])
            counts = np.array(found["bucket_counts"])
            values[name] = wandb.Histogram(np_histogram=(counts, edges))
        self._run.log(values, step=iteration)

    def _end(self, state: str) -> None:
        if state == KILLED:
            self._run.mark_preempting()
        self._run.finish(exit_code={FINISHED: 0, KILLED: 143}.get(state, 1))
