"""The settings of a training: plain values, the same for every config language."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..yaml_files import dotted, name_of


@dataclass(frozen=True)
class Settings:
    """The values of a training, and the names of their keys.

    Attributes:
        output_dir: for checkpoints and logs.
        max_iter: steps.
        seed: of random numbers and the order of images; negative for one that is drawn.
        weights: to start from; "" for none.
        weights_partial: whether they may fit a part of the backbone.
        amp: mixed precision.
        accumulate: parts of a process's batch that go through the model one after the other.
        max_skipped_steps: steps that are not finite which are left out before the run stops.
        grace_period: seconds from SIGTERM until the run is ended by force.
        checkpoint_period: in steps.
        checkpoints_to_keep: periodic checkpoints that stay, the newest; 0 for all.
        eval_period: in steps; 0 evaluates after the last step only.
        log_period: in steps.
        image_format: channel order of the images.
        vis_period: in steps; 0 draws no loss maps.
        precise_bn: batches for the precise statistics of batch norms; 0 for none.
        expected_ap: box AP that the teacher has to reach before the training, in [0, 100]; 0
            checks nothing.
        report: whether report.html is written at the end.
        test_sets: names of the data sets that are evaluated on.
        ddp: arguments of Detectron2's ``create_ddp_model``.
        language: of the config: "YAML", "LazyConfig", or "Python" for none.
        keys: the name of a setting in the user's config, for messages.
    """

    output_dir: str
    max_iter: int
    seed: int = -1
    weights: str = ""
    weights_partial: bool = False
    amp: bool = False
    accumulate: int = 1
    max_skipped_steps: int = 0
    grace_period: float = 25.0
    checkpoint_period: int = 5000
    checkpoints_to_keep: int = 2
    eval_period: int = 0
    log_period: int = 20
    image_format: str = "BGR"
    vis_period: int = 0
    precise_bn: int = 0
    expected_ap: float = 0.0
    report: bool = True
    test_sets: Sequence[str] = ()
    ddp: Mapping[str, Any] = field(default_factory=lambda: {"broadcast_buffers": False})
    language: str = "Python"
    keys: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        get: Callable[[str], Any],
        keys: Mapping[str, str],
        names: Mapping[str, str],
        **more: Any,
    ) -> "Settings":
        """Read the settings from a config.

        Args:
            get: returns the value of a key, None if it is not set.
            keys: by name of the setting.
            names: of further parts of the training, for messages.
            more: values of further settings.

        Raises:
            ValueError: a value out of its range; names the key.
        """
        found = {f.name: get(keys[f.name]) for f in fields(cls) if f.name in keys}
        given = {name: value for name, value in found.items() if value is not None}
        return cls(**{**given, **more}, keys={**keys, **names})

    def key(self, name: str) -> str:
        """What a setting, or another part of the training, is called in the user's config."""
        return self.keys.get(name, name)

    def __post_init__(self) -> None:
        def expect(valid: bool, name: str, expected: str) -> None:
            if not valid:
                value = getattr(self, name)
                raise ValueError(f"{self.key(name)} is {value!r}; expected {expected}.")

        expect(self.max_iter >= 1, "max_iter", "1 or more iterations")
        expect(
            self.checkpoint_period >= 1,
            "checkpoint_period",
            f"1 or more steps; more than {self.key('max_iter')} saves the final checkpoint only",
        )
        # The clock takes no longer waits; NaN fails as well.
        in_range = 0 <= self.grace_period <= threading.TIMEOUT_MAX
        expect(in_range, "grace_period", "seconds, 0 or more")
        skipped = "0 (stop at the first step that is not finite) or more"
        expect(self.max_skipped_steps >= 0, "max_skipped_steps", skipped)
        expect(self.accumulate >= 1, "accumulate", "1 or more parts of a batch")
        expect(self.checkpoints_to_keep >= 0, "checkpoints_to_keep", "0 (all) or more")
        expect(0 <= self.expected_ap <= 100, "expected_ap", "an AP in [0, 100]; 0 checks nothing")
        folder = "a folder for checkpoints and logs (it is made if missing)"
        expect(bool(self.output_dir), "output_dir", folder)


def as_text(config: Mapping[str, Any], *, left_out: tuple[str, ...] = ()) -> str:
    """Every key and value of a config, as JSON that :func:`differences` reads, a line each.

    Args:
        config: nested, of any values.
        left_out: keys that change nothing in what a run computes.
    """
    found = {
        name: value
        for name, value in dotted(config)
        if not any(name == key or name.startswith(f"{key}.") for key in left_out)
    }
    return json.dumps(found, sort_keys=True, default=name_of, indent=0)


def differences(ours: str, theirs: str) -> list[str]:
    """What two texts of :func:`as_text` differ in.

    Returns:
        a line for each key: "KEY: value in ``ours`` (was: value in ``theirs``)".
    """
    now, was = json.loads(ours), json.loads(theirs)
    return [
        f"{key}: {now.get(key, 'no such key')} (was: {was.get(key, 'no such key')})"
        for key in sorted(now.keys() | was.keys())
        if now.get(key) != was.get(key)
    ]
