"""The checkpoints in the folder of a run, local or remote: which there are, and the newest."""

import logging
import os
import re
from collections.abc import Iterator
from typing import Any

from detectron2.utils.file_io import PathManager

from ..unpickling import read_torch_file
from ..writing import folder_of, is_remote
from .files import is_zip, read_checkpoint

logger = logging.getLogger(__name__)

#: The checkpoint of the best evaluation.
BEST = "model_best.pth"
#: The checkpoint after the last step.
FINAL = "model_final.pth"
#: Names the checkpoint that a resume takes first.
TAG = "last_checkpoint"
#: What that holds while a run has saved nothing yet, in a folder with those of an earlier one.
NONE_YET = "none yet"


def _local_copy(path: str) -> str:
    return str(PathManager.get_local_path(path, force=True)) if is_remote(path) else path


def read_local_copy(path: str) -> dict[str, Any]:
    """Read a checkpoint; of a remote one, a fresh copy.

    Raises:
        ValueError: it is damaged.
        OSError: it is missing.
    """
    return read_checkpoint(_local_copy(path))


def iteration_of(path: str) -> int | None:
    """The iteration of a periodic checkpoint, ``model_0004999.pth``; None for other files."""
    match = re.fullmatch(r"model_(\d+)\.pth", os.path.basename(path))
    return int(match.group(1)) if match else None


def run_of(path: str) -> str:
    """The run that wrote a checkpoint; "" if the file does not say, or cannot be read."""
    return _identity(path)[1]


def is_of_last_run(path: str) -> bool:
    """Whether a checkpoint is of the run that wrote last in its folder, and thus its config.yaml.

    True if the files do not say so.
    """
    folder = folder_of(path)
    last = tagged_in(folder)
    if last is None:
        return tag_of(folder) != NONE_YET
    return run_of(path) in ("", run_of(last))


def tag_of(folder: str) -> str:
    """What ``last_checkpoint`` holds, "" if it is missing."""
    path = os.path.join(folder, TAG)
    if not PathManager.isfile(path):
        return ""
    with PathManager.open(path, "rb") as file:
        return file.read().decode(errors="replace").strip()


def checkpoints_in(folder: str) -> list[str]:
    """The paths of the checkpoints that a run may have left, by name."""
    if not PathManager.isdir(folder):
        return []
    names = [n for n in PathManager.ls(folder) if iteration_of(n) is not None]
    names += [n for n in ("model_final.pth",) if PathManager.isfile(os.path.join(folder, n))]
    return [os.path.join(folder, name) for name in sorted(names)]


def tagged_in(folder: str) -> str | None:
    """The checkpoint that ``last_checkpoint`` names; None for another file, or none."""
    tag = tag_of(folder)
    if not tag.endswith(".pth") or os.path.basename(tag) != tag:
        return None
    path = os.path.join(folder, tag)
    return path if "\0" not in tag and PathManager.isfile(path) else None


def _newest_first(folder: str) -> Iterator[str]:
    """The tagged checkpoint, those that cannot be read, then the others: of the latest run first.

    Within a run the later iteration comes first. The times of files say nothing: copies change
    them.
    """
    tagged = tagged_in(folder)
    if tagged:
        yield tagged
    # Lazily: each is opened.
    others = [path for path in checkpoints_in(folder) if path != tagged]
    yield from sorted(others, key=_identity, reverse=True)


def newest_whole(folder: str) -> tuple[str | None, str | None]:
    """(path, None), (None, None) without a checkpoint, or (None, what is wrong)."""
    tag, seen = tag_of(folder), 0
    if tag == NONE_YET:
        return None, None
    for path in _newest_first(folder):
        if not seen and os.path.basename(path) != tag:
            logger.warning(
                "%s in %s holds %r, which is not the name of a checkpoint there: the newest "
                "checkpoint of the folder is taken.",
                *(TAG, folder, tag),
            )
        seen += 1
        try:
            read_local_copy(path)
        except (ValueError, OSError) as error:
            logger.error("Checkpoint skipped: %s", error)
        else:
            return path, None
    if seen:
        return None, (
            f"--resume: none of the {seen} checkpoints in {folder} can be read (the log "
            "has the reasons). Move them away to start anew."
        )
    if tag:
        return None, (
            f"--resume: {TAG} in {folder} names {tag}, which is missing there, and "
            "no other checkpoint was found. Restore it, or remove last_checkpoint to start anew."
        )
    return None, None


def _identity(path: str) -> tuple[bool, str, int]:
    """Whether it is damaged, its run, its iteration. Tensors are not read."""
    try:
        local = _local_copy(path)
        found = read_torch_file(local, mmap=is_zip(local))
        return False, str(found.get("run", "")), int(found.get("iteration", -1))
    except Exception:
        return True, "", iteration_of(path) or -1
