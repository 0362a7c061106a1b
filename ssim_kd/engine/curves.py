"""The curves of the metrics, carried across a resume."""

from typing import Any

from detectron2.engine import HookBase

# Over so many iterations do Detectron2's writers take the median.
WINDOW = 20


class KeepCurves(HookBase):
    """Has the last values of each metric saved, so that a resumed run writes the same medians."""

    def __init__(self) -> None:
        self._curves: dict[str, dict[str, Any]] = {}

    def state_dict(self) -> dict[str, Any]:
        """The metrics of the present iteration, with those of the iterations before."""
        storage = getattr(self.trainer, "storage", None)
        if storage is None:
            return self._curves
        hints = storage.smoothing_hints()
        curves = {}
        for name, history in storage.histories().items():
            values = history.values()[-WINDOW:]
            # Times are of the run that took them; an evaluation has its own iterations.
            if "time" not in name and "eta" not in name and values[-1][1] == self.trainer.iter:
                curves[name] = {
                    "values": [(float(value), int(iteration)) for value, iteration in values],
                    "smooth": bool(hints[name]),
                }
        return curves

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up :meth:`state_dict`."""
        self._curves = state_dict

    def before_train(self) -> None:
        """Put the values where the writers find them."""
        storage = self.trainer.storage
        now = storage.iter
        for name, curve in self._curves.items():
            for value, storage.iter in curve["values"]:
                storage.put_scalar(name, value, smoothing_hint=curve["smooth"])
        storage.iter = now
