"""Finds the runs that a run is compared with: its teacher, its control, and its start."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import BEST
from ..metrics_file import METRICS_FILE
from .detections import find_test_set
from .runs import NotAvailableError, Run, read_config, read_run

# Keys that the control of a run may have otherwise: those of distillation, and those that change
# nothing in what is trained.
_MAY_DIFFER = re.compile(
    r"MODEL\.DISTILL\..*|MODEL\.META_ARCHITECTURE|OUTPUT_DIR|VIS_PERIOD|TEST\.REPORT|TRACKING\..*|"
    r"train\.(output_dir|vis_period|report|writers)"
)
_NAMED = "Name the folder with {flag}."


def find_teacher(run: Run) -> Run:
    """The run that made the teacher, by the keys of its config.

    Raises:
        NotAvailableError: the run has no teacher, or the teacher's run is not here.
    """
    if not run.distils:
        raise NotAvailableError("the training had none")
    name = run.teacher_name
    weights = _teachers_weights(run)
    for path in (Path(text).expanduser() for text in (weights, name) if text):
        folder = path if path.is_dir() else path.parent
        if path.exists() and (folder / METRICS_FILE).is_file():
            return read_run(folder)
    shown = " with the weights ".join(filter(None, (name, weights)))
    raise NotAvailableError(f"no metrics.json next to {shown}. {_NAMED.format(flag='--teacher')}")


def teacher_iteration(run: Run, teacher: Run) -> int | None:
    """The iteration whose evaluation is that of the weights which taught; None for the last.

    Raises:
        NotAvailableError: the weights are a checkpoint that was not evaluated.
    """
    name = Path(_teachers_weights(run)).name
    series = teacher.boxes(0).get("AP")
    best = name == BEST or (not name and not _has_final(teacher))
    if series is None:
        return None
    if best and series.finite():
        return max(series.finite(), key=lambda pair: pair[::-1])[0]
    numbered = re.fullmatch(r"model_(\d+)\.pth", name)
    if not numbered:
        return None
    for iteration in (int(numbered[1]), int(numbered[1]) + 1):
        if iteration in series.iterations:
            return iteration
    raise NotAvailableError(f"its checkpoint {name} was not evaluated")


def _teachers_weights(run: Run) -> str:
    # What was taken; of older runs, what was asked for.
    asked = run.get("MODEL.DISTILL.TEACHER.WEIGHTS", "model.teacher.weights", "")
    return run.teacher.get("weights") or str(asked or "")


def _has_final(run: Run) -> bool:
    return (run.folder / "model_final.pth").is_file()


def check_same_test_set(run: Run, other: Run) -> None:
    """Two runs can be compared if their last test sets have the same boxes.

    Raises:
        NotAvailableError: they have not, or that is unknown.
    """
    ours, theirs = (r.test_sets[-1] if r.test_sets else "no known set" for r in (run, other))
    if ours != theirs:
        raise NotAvailableError(f"{other.folder} was tested on {theirs}, not on {ours}")
    try:
        same = find_test_set(run, ours).is_same(find_test_set(other, theirs))
    except NotAvailableError:
        return  # a custom set, of which only the name is known
    if not same:
        raise NotAvailableError(f"{other.folder} was tested on another file named {theirs}")


def find_control(run: Run, given: Sequence[Run] = ()) -> Run:
    """The run that differs only by distillation: of those on the page, or in a folder next to it.

    Raises:
        NotAvailableError: the training did not distil; no run fits, or more than one.
    """
    if not run.distils:
        raise NotAvailableError("the training did not distil: it is itself a plain run")
    if not run.config:
        raise NotAvailableError(f"its config is unknown. {_NAMED.format(flag='--control')}")
    found = []
    shown = {other.folder.resolve() for other in given}
    for folder in sorted({*run.folder.resolve().parent.iterdir(), *shown}):
        there = all((folder / name).is_file() for name in ("config.yaml", METRICS_FILE))
        if there and folder != run.folder.resolve():
            other = read_config(folder)
            if not other.distils and not differences(run, other):
                found.append(read_run(folder))
    found = [other for other in found if other.boxes()]
    found = [other for other in found if other.folder in shown] or found
    if len(found) == 1:
        return found[0]
    parent = run.folder.resolve().parent
    reason = f"no run in {parent} has the same config without distillation"
    if found:
        reason = "several runs could be it: " + ", ".join(str(r.folder) for r in found)
    raise NotAvailableError(f"{reason}. {_NAMED.format(flag='--control')}")


def differences(run: Run, other: Run) -> dict[str, tuple[Any, Any]]:
    """What the configs of two runs differ in, except for distillation, by key."""
    ours, theirs = _of_student(run.config), _of_student(other.config)
    pairs = {k: (ours.get(k), theirs.get(k)) for k in ours | theirs if not _MAY_DIFFER.fullmatch(k)}
    pairs["MODEL.META_ARCHITECTURE"] = (_architecture(run), _architecture(other))
    # A LazyConfig names the value of another key; --teacher puts the value there.
    return {
        key: pair for key, pair in pairs.items() if pair[0] != pair[1] and "${" not in str(pair)
    }


def _of_student(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config; of a LazyConfig with a teacher as those of its student without."""
    if not any(key.startswith("model.student.") for key in config):
        return dict(config)
    kept = {k: v for k, v in config.items() if not k.startswith("model.") or ".student." in k}
    return {k.replace("model.student.", "model.", 1): v for k, v in kept.items()}


def _architecture(run: Run) -> str:
    name = str(run.get("MODEL.META_ARCHITECTURE"))
    own = run.get("MODEL.DISTILL.STUDENT_META_ARCHITECTURE")
    return str(own) if name == "DistilledDetector" else name


def find_start(run: Run) -> Run:
    """The run whose weights the student started from.

    Raises:
        NotAvailableError: it started from other weights.
    """
    weights = str(run.get("MODEL.WEIGHTS", "train.init_checkpoint", "") or "")
    path = Path(weights).expanduser()
    if not weights or not path.is_file() or not (path.parent / METRICS_FILE).is_file():
        raise NotAvailableError("the weights that it started from are those of no run")
    return read_run(path.parent)
