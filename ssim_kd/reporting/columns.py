"""The runs of a page side by side: who is who, their AP, and what is not known of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pycocotools.coco import COCO

from .charts import NUM_COLOURS
from .detections import Detections, TestSet, detections_of, find_test_set, read_truth
from .errors import evaluate_boxes
from .relatives import (
    check_same_test_set,
    differences,
    find_control,
    find_start,
    find_teacher,
    teacher_iteration,
)
from .runs import PREDICTIONS, NotAvailableError, Run

#: The teacher's colour, which no other run has.
TEACHERS_NUMBER = NUM_COLOURS - 1
#: Of runs that others are compared with, in the order of the page.
ROLES = ("control", "start", "teacher")

_Found = TypeVar("_Found")


@dataclass
class Column:
    """A run on the page.

    Attributes:
        run: what its folder holds.
        role: "distilled" or "plain"; or "teacher", "control", "start", which others are compared
            with.
        label: its name on the page.
        number: of its colour.
        ap: box AP on the last test set, 0 to 100, under the names of Detectron2.
        detections: on that set; None if they are not available.
    """

    run: Run
    role: str
    label: str
    number: int
    ap: dict[str, float] = field(default_factory=dict)
    detections: Detections | None = None

    @property
    def is_reference(self) -> bool:
        """Whether the others are compared with it."""
        return self.role in ROLES


@dataclass
class Comparison:
    """All that a page shows.

    Attributes:
        columns: the runs that were asked for first; then control or start, and teacher.
        test_set: that of the detections, the last of DATASETS.TEST; None if it is unknown.
        truth: its boxes.
        absent: sentences on what is not available, by section of the page.
    """

    columns: list[Column] = field(default_factory=list)
    test_set: TestSet | None = None
    truth: COCO | None = None
    absent: dict[str, list[str]] = field(default_factory=dict)

    @property
    def student(self) -> Run:
        """The first run that had a teacher; the first of all if none had."""
        return next((c.run for c in self.columns if c.run.distils), self.columns[0].run)

    def attempt(
        self, section: str, what: str, find: Callable[..., _Found], *args: object
    ) -> _Found | None:
        """What a function finds, or None and a sentence on the page."""
        try:
            return find(*args)
        except NotAvailableError as error:
            self.note(section, f"{what}: not available: {error}")
            return None

    def note(self, section: str, sentence: str) -> None:
        """Add a sentence to a section, once."""
        sentence = sentence if sentence.endswith(".") else f"{sentence}."
        notes = self.absent.setdefault(section, [])
        if sentence not in notes:
            notes.append(sentence)

    def of_role(self, *roles: str) -> Column | None:
        """The first column with one of the roles."""
        return next((c for c in self.columns if c.role in roles), None)


def compare(
    runs: Sequence[Run], *, teacher: Run | None = None, control: Run | None = None
) -> Comparison:
    """Put runs next to each other, and next to teacher and control.

    Args:
        runs: at least one.
        teacher, control: named by the user. None looks for those that all runs have in common.
    """
    page = Comparison()
    for run in runs:
        _add(page, run, "distilled" if run.distils else "plain")
    if control is None and any(run.distils for run in runs):
        control = page.attempt("ap", "Control", _control_of_all, runs)
    if control is not None:
        _add(page, control, "control")
        for run in runs:
            _note_differences(page, run, control)
    elif len(runs) == 1 and runs[0].distils:
        start = page.attempt("ap", "AP of the start weights", find_start, runs[0])
        if start is not None:
            _add(page, start, "start")
    if teacher is None and any(run.distils for run in runs):
        teacher = page.attempt("ap", "Teacher", _teacher_of_all, runs)
    if teacher is not None:
        _add(page, teacher, "teacher")
    page.columns.sort(key=lambda column: ROLES.index(column.role) if column.is_reference else -1)
    _name(page.columns)
    _read_detections(page)
    for column in page.columns:
        _read_ap(page, column)
    return page


def _note_differences(page: Comparison, run: Run, control: Run) -> None:
    """Name what else the gain comes from."""
    if not (run.config and control.config):
        return
    found = differences(run, control)
    if found:
        named = [f"{key} ({theirs}, not {ours})" for key, (ours, theirs) in sorted(found.items())]
        more = f" and {len(named) - 6} more" if len(named) > 6 else ""
        page.note(
            "result",
            f"{control.folder} is not the control of {run.folder}: it differs in "
            f"{', '.join(named[:6])}{more}. The gain is not only that of distillation",
        )


def _control_of_all(runs: Sequence[Run]) -> Run:
    """The control that the runs have in common."""
    return _common((find_control(run, runs) for run in runs if run.distils), "--control")


def _teacher_of_all(runs: Sequence[Run]) -> Run:
    """The teacher that the runs have in common."""
    evaluated = runs[0].folder / "teacher"
    if len(runs) == 1 and (evaluated / PREDICTIONS).is_file():
        # Detectron2 writes no metrics for it, so that its AP comes of the detections.
        return Run(evaluated, config=runs[0].config)
    return _common((find_teacher(run) for run in runs if run.distils), "--teacher")


def _common(runs: Iterable[Run], flag: str) -> Run:
    found = {str(run.folder.resolve()): run for run in runs}
    if len(found) > 1:
        raise NotAvailableError(
            f"there are several: {', '.join(sorted(found))}. Name one by {flag}"
        )
    return next(iter(found.values()))


def _add(page: Comparison, run: Run, role: str) -> None:
    number = TEACHERS_NUMBER if role == "teacher" else len(page.columns) % TEACHERS_NUMBER
    for column in page.columns:
        if column.run.folder.resolve() == run.folder.resolve():
            # Asked for as a run as well.
            column.role = role
            column.number = number if role == "teacher" else column.number
            return
    page.columns.append(Column(run, role, run.folder.name, number))


def _name(columns: Sequence[Column]) -> None:
    """The shortest ends of their paths that differ; a number is not a name."""
    for column in columns:
        parts = column.run.folder.resolve().parts
        for count in range(1, len(parts)):
            label = "/".join(parts[-count:])
            others = [c for c in columns if c is not column]
            ends = ["/".join(c.run.folder.resolve().parts[-count:]) for c in others]
            if label not in ends and not label.isdigit():
                break
        column.label = label


def _read_detections(page: Comparison) -> None:
    first = page.columns[0].run
    name = first.test_sets[-1] if first.test_sets else ""
    page.test_set = page.attempt("errors", "Error types", find_test_set, first, name)
    if page.test_set is None:
        return
    page.truth = page.attempt("errors", "Error types", read_truth, page.test_set)
    for column in page.columns if page.truth else ():
        column.detections = page.attempt(
            "errors", f"Errors of {column.label}", _own_detections, page, column
        )


def _own_detections(page: Comparison, column: Column) -> Detections:
    assert page.test_set is not None and page.truth is not None
    check_same_test_set(page.columns[0].run, column.run)
    if column.role == "teacher" and column.run.config is not page.columns[0].run.config:
        # Its folder shows its last weights.
        wanted = teacher_iteration(page.student, column.run)
        known = column.run.boxes().get("AP")
        if wanted is not None and known is not None and wanted != known.iterations[-1]:
            raise NotAvailableError("it taught with other weights than its last")
    return detections_of(column.run, page.truth)


def _read_ap(page: Comparison, column: Column) -> None:
    """Take the AP from metrics.json, or compute it from the detections."""
    first, run = page.columns[0].run, column.run
    what = f"AP of {column.label}"
    try:
        if run is not first:
            check_same_test_set(first, run)
        at = teacher_iteration(page.student, run) if column.role == "teacher" else None
    except NotAvailableError as error:
        page.note("ap", f"{what}: not available: {error}")
        return
    series = run.boxes()
    if series.get("AP"):
        at = series["AP"].iterations[-1] if at is None else at
        column.ap = {
            name: known.values[known.iterations.index(at)]
            for name, known in series.items()
            if at in known.iterations
        }
    elif column.detections and page.truth:
        found = column.detections
        column.ap = evaluate_boxes(page.truth, found.found, limit=found.limit)
        page.note("ap", f"{what}: computed by pycocotools from its detections.")
        return
    else:
        page.note("ap", f"{what}: not available: no evaluation in {run.folder / 'metrics.json'}")
        return
    if column.detections:
        ap50 = column.detections.errors.ap50
        if abs(ap50 - column.ap.get("AP50", ap50)) > 0.05:
            page.note(
                "errors",
                f"The detections in {run.folder / Path(PREDICTIONS).parent} are not those of the "
                f"AP above: AP50 {ap50:.2f}, but {column.ap['AP50']:.2f} in metrics.json.",
            )
