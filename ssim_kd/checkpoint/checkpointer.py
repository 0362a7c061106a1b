"""Checkpoints of a training: the plain student, written atomically; which one a resume takes."""

import argparse
import copy
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import nn

from ..writing import remove_unfinished, write_atomically
from .files import model_of, read_checkpoint

# A start may lack these: files of ImageNet backbones do not have them, and their initial values are
# neutral.
_NEUTRAL = ("num_batches_tracked", "conv2_offset")
#: The checkpoint of the best evaluation.
BEST = "model_best.pth"
# The tag of a run that has saved nothing yet, in a folder with checkpoints of an earlier one.
_NONE_YET = "none yet"
# What a reader that runs no code reads back, beside containers of these.
_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, set, argparse.Namespace),
    *(torch.Tensor, nn.Parameter, torch.Size, torch.dtype, torch.device),
)


class ResumeError(ValueError):
    """A checkpoint that is whole, but that does not fit this training."""


class StudentCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, with atomic writes and a resume that skips damaged files.

    - A file is written beside its place, synced and renamed; ``last_checkpoint`` follows it. A
      run that is killed while it saves keeps its earlier checkpoints.
    - A resume takes the newest checkpoint that is whole, and logs the ones that are not.
    - What a resume could not read is refused when it is saved.
    - Weights to start from must fit the whole backbone of the student, unless ``partial``.

    "model" holds the plain student. Other states of the training have keys of their own.

    Attributes:
        last_saved: iteration of the checkpoint that was saved last; None before the first, and
            in processes that save none.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str,
        *,
        keep: int = 0,
        partial: bool = False,
        **others: Any,
    ) -> None:
        """
        Args:
            model: the student.
            save_dir: folder of the checkpoints.
            keep: number of periodic checkpoints that stay, the newest; 0 for all.
            partial: whether weights to start from may fit a part of the backbone.
            others: objects with ``state_dict()``, saved under their names.

        Raises:
            ValueError: ``keep`` is negative.
        """
        super().__init__(model, save_dir, **others)
        if keep < 0:
            raise ValueError(f"SOLVER.CHECKPOINTS_TO_KEEP is {keep}; expected 0 or more.")
        self.keep = keep
        self.partial = partial
        self.last_saved: int | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``{name}.pth`` and tag it as the last.

        Raises:
            OSError: the write failed; the earlier checkpoints are whole.
            ValueError: a state holds what a resume could not read; names where.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        if "://" in self.save_dir:
            super().save(name, **kwargs)
            self.last_saved = kwargs.get("iteration")
            return
        data = {"model": self.model.state_dict()}
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        data.update(kwargs)
        data = plain(data)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        write_atomically(path, lambda file: torch.save(data, file))
        self.tag_last_checkpoint(f"{name}.pth")
        self.last_saved = kwargs.get("iteration")
        self._prune(path)

    def _prune(self, written: str) -> None:
        # By age, not by iteration: an earlier run may have left later ones.
        periodic = sorted(
            (p for p in self.get_all_checkpoint_files() if _iteration(p) is not None),
            key=lambda p: (p == written, os.path.getmtime(p)),
        )
        for path in periodic[: -self.keep] if self.keep else []:
            os.unlink(path)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Make a checkpoint the one that ``--resume`` takes first."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        if "://" in self.save_dir:
            super().tag_last_checkpoint(last_filename_basename)
            return
        write_atomically(path, lambda file: file.write(last_filename_basename.encode()))

    def resume_or_load(self, path: str, *, resume: bool = True) -> bool:  # type: ignore[override]
        """Resume from the newest whole checkpoint, or load weights to start from.

        Args:
            path: weights to start from; "" for none.
            resume: whether to look for a checkpoint first.

        Returns:
            whether a checkpoint was resumed from.

        Raises:
            ValueError: checkpoints exist and none is whole, or one does not fit the training.
        """
        if resume and self.save_to_disk and os.path.isdir(self.save_dir):
            for left in remove_unfinished(self.save_dir):
                self.logger.info("Removed %s, which an earlier run did not finish.", left)
        found = self.newest() if resume else None
        if found is None:
            if resume:
                self.logger.info("No checkpoint in %s: training starts anew.", self.save_dir)
            self._start(path)
            self._begin_anew()
            return False
        self._resume(found)
        return True

    def _start(self, path: str) -> None:
        try:
            # A "~" is known to no reader of Detectron2's.
            self.load(os.path.expanduser(path), checkpointables=[])
        except (ValueError, AssertionError, RuntimeError) as error:
            raise ValueError(f"MODEL.WEIGHTS is {path!r}: {error}") from error

    def _begin_anew(self) -> None:
        """Keep a later resume from the checkpoints that an earlier run has left in the folder."""
        left = self._candidates() if self.save_to_disk else []
        if left:
            best = Path(self.save_dir, BEST)
            names = [BEST] * best.is_file() + [os.path.basename(path) for path in left]
            self.logger.warning(
                "%s holds %d checkpoints of an earlier run (%s). This run starts anew and will "
                "overwrite those of equal names; was --resume meant?",
                *(self.save_dir, len(names), ", ".join(names[:3] + ["..."] * (len(names) > 3))),
            )
            self.tag_last_checkpoint(_NONE_YET)

    def newest(self) -> str | None:
        """The newest checkpoint that is whole, the same on every process; None if there is none.

        Every process must call it; the main one decides.

        Raises:
            ValueError: checkpoints exist and none is whole; on every process.
        """
        found, error = comm.all_gather(
            self._newest_whole() if comm.is_main_process() else (None, None)
        )[0]
        if error:
            raise ValueError(error)
        return str(found) if found else None

    def _newest_whole(self) -> tuple[str | None, str | None]:
        """(path, None), (None, None) where no checkpoint is, or (None, what is wrong)."""
        tag, candidates = self._tag(), self._candidates()
        if tag == _NONE_YET:
            return None, None
        if tag and not candidates:
            return None, (
                f"--resume: last_checkpoint in {self.save_dir} names {tag}, which is missing, and "
                "there is no other checkpoint. Restore it, or remove last_checkpoint to start anew."
            )
        if candidates and os.path.basename(candidates[0]) != tag:
            self.logger.warning(
                "last_checkpoint names no file in %s: the newest checkpoint is taken.",
                self.save_dir,
            )
        for path in candidates:
            try:
                read_checkpoint(path)
            except (ValueError, OSError) as error:
                self.logger.error("Checkpoint skipped: %s", error)
            else:
                return path, None
        if candidates:
            return None, (
                f"--resume: none of the {len(candidates)} checkpoints in {self.save_dir} can be "
                "read (the log has the reasons). Move them away to start anew."
            )
        return None, None

    def _tag(self) -> str:
        """What ``last_checkpoint`` holds, "" where there is none."""
        path = Path(self.save_dir, "last_checkpoint")
        return path.read_text(errors="replace").strip() if path.is_file() else ""

    def _candidates(self) -> list[str]:
        """The tagged checkpoint, then the others from the newest on."""
        if not os.path.isdir(self.save_dir):
            return []
        names = [
            os.path.basename(path)
            for path in sorted(self.get_all_checkpoint_files(), key=os.path.getmtime, reverse=True)
        ]
        names = [n for n in names if _iteration(n) is not None or n == "model_final.pth"]
        tag = self._tag()
        if tag and "\0" not in tag and os.path.isfile(os.path.join(self.save_dir, tag)):
            names = [tag, *(name for name in names if name != tag)]
        return [os.path.join(self.save_dir, name) for name in names]

    def _resume(self, path: str) -> None:
        self.logger.info("Resuming from %s", path)
        checkpoint = _with_named_distiller(read_checkpoint(path), self.checkpointables)
        missing = [key for key in self.checkpointables if key not in checkpoint]
        extra = [
            key for key in ("distillers",) if key in checkpoint and key not in self.checkpointables
        ]
        if extra:
            raise ResumeError(
                f"--resume: {path} holds {extra}: that run was distilled, but this one has no "
                "teacher. Expected the same --teacher, or MODEL.DISTILL.* of that run."
            )
        if missing:
            raise ResumeError(
                f"--resume: {path} lacks {missing}: it was not written by a training with this "
                "config."
            )
        incompatible = self._load_model(checkpoint)
        if any(incompatible):
            raise ResumeError(f"--resume: {path} does not fit the student: {incompatible}")
        for key, obj in self.checkpointables.items():
            try:
                obj.load_state_dict(checkpoint[key])
            except ResumeError:
                raise
            except (RuntimeError, KeyError, ValueError) as error:
                raise ResumeError(
                    f"--resume: what {path} holds under {key!r} does not fit this config: {error}"
                ) from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        data = read_checkpoint(filename)
        where, model = model_of(data)
        if not isinstance(model, Mapping):
            raise ValueError(f"its {where} is a {type(model).__name__}; expected a dict of tensors")
        data = {**data, "model": model} if where == "model" else {"model": model}
        if where == "content" and filename.endswith(".pkl"):
            # Detectron1 and Caffe2: detectors have "blobs", ImageNet backbones do not.
            arrays = data["model"].get("blobs", data["model"])
            arrays = {k: v for k, v in arrays.items() if not k.endswith("_momentum")}
            data = {"model": arrays, "__author__": "Caffe2", "matching_heuristics": True}
        # Detectron2 main takes what stands behind a "?" in MODEL.WEIGHTS for options.
        url: Any = getattr(self, "_parsed_url_during_load", None)
        options = parse_qs(url.query) if url else {}
        if options.pop("matching_heuristics", None) == ["True"]:
            data["matching_heuristics"] = True
        if options:
            raise ValueError(
                f"MODEL.WEIGHTS is {url.geturl()!r}, with the unknown options {sorted(options)}; "
                "expected none, or '?matching_heuristics=True'."
            )
        return data

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """A start may lack the heads; weights that fit a part of the backbone are an error."""
        backbone = getattr(self.model, "backbone", None)
        prefix = "backbone.bottom_up." if hasattr(backbone, "bottom_up") else "backbone."
        shapes = [key for key, *_ in incompatible.incorrect_shapes]
        # A key of another shape counts as missing as well.
        wrong = [
            key
            for key in dict.fromkeys([*incompatible.missing_keys, *shapes])
            if key.startswith(prefix) and not any(part in key for part in _NEUTRAL)
        ]
        if wrong and not self.partial:
            raise ValueError(
                f"{len(wrong)} keys of the student under {prefix} are missing in it or of another "
                f"shape (e.g. {', '.join(wrong[:3])}). Expected weights of this backbone, '' to "
                "start from random ones, or MODEL.WEIGHTS_PARTIAL True to start these keys from "
                "random ones."
            )
        super()._log_incompatible_keys(incompatible)


def _with_named_distiller(
    checkpoint: dict[str, Any], checkpointables: Mapping[str, Any]
) -> dict[str, Any]:
    """A checkpoint of before there were several terms: its one distiller has no name."""
    distillers = checkpointables.get("distillers", {})
    if "distiller" in checkpoint and len(distillers) <= 1:
        (name,) = distillers or ("distiller",)
        state = checkpoint.pop("distiller")
        checkpoint["distillers"] = {f"{name}.{key}": value for key, value in state.items()}
    return checkpoint


def _iteration(path: str) -> int | None:
    """The iteration of a periodic checkpoint, ``model_0004999.pth``; None for other files."""
    match = re.fullmatch(r"model_(\d+)\.pth", os.path.basename(path))
    return int(match.group(1)) if match else None


def plain(value: Any, where: str = "") -> Any:
    """A state with NumPy's scalars as Python's, which every reader of checkpoints reads.

    Args:
        value: numbers, text, tensors, arrays, and containers of them.
        where: its place in the checkpoint, for the message.

    Raises:
        ValueError: anything else; names the place.
    """
    if isinstance(value, np.generic):
        value = value.item()
    kind = type(value)
    if kind in (list, tuple):
        return kind(plain(item, f"{where}/{i}") for i, item in enumerate(value))
    if kind in (dict, OrderedDict, Counter):
        items = {plain(k, where): plain(v, f"{where}/{k}".lstrip("/")) for k, v in value.items()}
        # A copy keeps what a state dict carries beside its items.
        found = copy.copy(value)
        found.clear()
        found.update(items)
        return found
    if kind in _PLAIN or (kind is np.ndarray and not value.dtype.hasobject):
        return value
    raise ValueError(
        f"The checkpoint would hold a {kind.__module__}.{kind.__qualname__} at {where}, which a "
        "resume does not read. Expected numbers, text, tensors, arrays, and lists or dicts of them "
        "from the state_dict() that returned it. Nothing was written."
    )
