"""What the checks of data sets find."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Findings:
    """What a data set holds and what is wrong with it.

    Attributes:
        images, annotations, categories: how many there are.
        usable: annotations that are not crowds.
        empty_images: images without any annotation.
        clipped: boxes partly outside their image, which are clipped to it.
        zero_area: boxes of zero area, or wholly outside their image.
        scored: whether there are annotations at all (COCO's test-dev has none).
        zero_area_examples: some of these, in words.
        problems: what makes the file unusable, one clause each.
        untrainable, unscorable: what makes it unusable for training or for being scored, one
            sentence each.
        notes: what deserves a line in the log, one clause each.
    """

    images: int = 0
    annotations: int = 0
    categories: int = 0
    usable: int = 0
    empty_images: int = 0
    clipped: int = 0
    zero_area: int = 0
    scored: bool = True
    zero_area_examples: str = ""
    problems: list[str] = field(default_factory=list)
    untrainable: list[str] = field(default_factory=list)
    unscorable: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DatasetSummary:
    """What a checked data set holds. Its text is one line for the log.

    ``findings`` is None for a set of which neither a json file of COCO's format nor records can be
    inspected: then only its classes and its folder were checked. ``classes`` are the names of its
    classes, by number.
    """

    key: str
    name: str
    findings: Findings | None
    training: bool = False
    classes: Sequence[str] = ()

    def __str__(self) -> str:
        found = self.findings
        if found is None:
            return f"{self.key}: {self.name}: registered; its content is not checked"
        text = (
            f"{self.key}: {self.name}: {found.images} images, {found.annotations} annotations, "
            f"{found.categories} categories"
        )
        if not found.scored:
            return f"{text}; no ground truth: predictions are written, not scored"
        if found.empty_images:
            text += f"; {found.empty_images} images without annotations"
        if found.clipped:
            text += f"; {found.clipped} boxes clipped to their images"
        if found.zero_area:
            fate = "left out" if self.training else "kept in the evaluation"
            text += f"; {found.zero_area} boxes of zero area {fate}"
        return "; ".join([text, *found.notes])


def class_names(summaries: Sequence[DatasetSummary]) -> Sequence[str]:
    """The names of the classes, by number, of the first set that has any; () if none has."""
    return next((found.classes for found in summaries if found.classes), ())
