"""A study of a few lines: one config, one data set, one teacher, arms and seeds."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..modeling.teacher_files import TeacherNotFoundError, find_teacher

_KEYS = {"title", "config", "data", "epochs", "teacher", "arms", "seeds", "opts"}
_ARM_KEYS = {"method", "weight", "opts"}
# COCO's own: boxes below 32 x 32 pixels are small.
_SMALL_BOX = 1024


def expand(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The full form of a study's content: unchanged if it has stages.

    In the short form an arm with a "method" or a "weight" learns from the teacher, and one without
    is the control. Every arm is compared with the first.

    Args:
        content: of the file.
        path: of the file, for messages.

    Raises:
        ValueError: a key is missing or unknown.
    """
    if "stages" in content:
        return {"small_box": _SMALL_BOX, **content}
    check(f"{path}", content, _KEYS, needed=("config", "arms", "seeds"))
    opts = dict(content.get("opts", {}))
    for key, name in (("data", "DATASETS.DATA_FILE"), ("epochs", "SOLVER.EPOCHS")):
        if key in content:
            opts[name] = content[key]
    arms = {}
    for name, given in content["arms"].items():
        arm = dict(given or {})
        check(f"{path}: arms.{name}", arm, _ARM_KEYS)
        method = arm.pop("method", None)
        if method is not None or "weight" in arm:
            if "teacher" not in content:
                raise ValueError(f"{path}: arms.{name} learns from a teacher: expected a teacher.")
            arm["opts"] = {
                "MODEL.DISTILL.TEACHER.NAME": content["teacher"],
                **({"MODEL.DISTILL.NAME": method} if method else {}),
                **arm.get("opts", {}),
            }
        arms[name] = arm
    first, *others = arms
    stage = {
        "arms": [*arms],
        "design": {"unit": "student", "students": {"": content["seeds"]}},
        "contrasts": [[other, first] for other in others],
        "title": "Students",
    }
    return {
        "short": True,
        "title": content.get("title", path.stem),
        "small_box": _SMALL_BOX,
        "opts": opts,
        "students": {"config": content["config"]},
        "arms": arms,
        "stages": {"main": stage},
    }


def contents(folder: Path, names: Mapping[str, str]) -> dict[str, str]:
    """The SHA-256 of the files behind the names of a study's teacher and data, by key.

    Args:
        folder: of the study, to which names are relative. One that is not a file here has none.
        names: by key of the config.
    """
    found = {}
    for key, name in names.items():
        digest = hashlib.sha256()
        for path in _files(folder / Path(name).expanduser()):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
            found[key] = digest.hexdigest()
    return found


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():  # of a run: what teaches
        with contextlib.suppress(TeacherNotFoundError):
            yield Path(find_teacher(str(path))[1])
    elif path.is_file():
        yield path
        found = yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else None
        for split in found.values() if isinstance(found, dict) else ():
            if isinstance(split, dict) and isinstance(split.get("json"), str):
                yield from _files(path.parent / Path(split["json"]).expanduser())


def check(place: str, content: Any, known: set[str], needed: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless a part of a study has all needed keys and only known ones."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{place} is {content!r}: expected a mapping.")
    missing = [key for key in needed if not content.get(key)]
    if missing:
        raise ValueError(f"{place}: {missing} are missing: expected at least {list(needed)}.")
    unknown = sorted(set(content) - known)
    if unknown:
        raise ValueError(f"{place} has {unknown}: expected {sorted(known)}.")
