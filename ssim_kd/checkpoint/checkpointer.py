"""Checkpoints of a training: the plain student, written atomically; which one a resume takes."""

import os
import secrets
import shutil
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any
from urllib.parse import parse_qs

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn

from ..sharing import without_queries
from ..unpickling import plain
from ..writing import remove_unfinished, write_atomically
from .files import model_of, read_checkpoint
from .folder import (
    BEST,
    NONE_YET,
    TAG,
    checkpoints_in,
    iteration_of,
    newest_whole,
    read_local_copy,
    run_of,
    tagged_in,
)
from .names import leave_out_compiled

# A start may lack these: files of ImageNet backbones do not have them, and their initial values are
# neutral.
_NEUTRAL = ("num_batches_tracked", "conv2_offset")


class ResumeError(ValueError):
    """A checkpoint that is whole, but that does not fit this training."""


class StudentCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, with atomic writes and a resume that skips damaged files.

    - A file is written next to its place, synced and renamed; ``last_checkpoint`` follows it. A
      run that is killed while it saves keeps its earlier checkpoints.
    - A resume takes the newest checkpoint that is whole, and logs the ones that are not.
    - What a resume could not read is refused when it is saved.
    - Weights to start from must fit the whole backbone of the student, unless ``partial``.

    "model" holds the plain student. Other states of the training have separate keys.

    Attributes:
        last_saved: iteration of the checkpoint that was saved last; None before the first, and
            in processes that save none.
        run: names the run in its checkpoints, also after a resume.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str,
        *,
        keep: int = 0,
        partial: bool = False,
        keys: tuple[str, str] = ("MODEL.WEIGHTS", "MODEL.WEIGHTS_PARTIAL"),
        **others: Any,
    ) -> None:
        """
        Args:
            model: the student.
            save_dir: folder of the checkpoints.
            keep: number of periodic checkpoints of this run that stay, the last; 0 for all.
            partial: whether weights to start from may fit a part of the backbone.
            keys: what sets these weights, and ``partial``; for messages.
            others: objects with ``state_dict()``, saved under their names.

        Raises:
            ValueError: ``keep`` is negative.
        """
        leave_out_compiled(model)
        super().__init__(model, save_dir, **others)
        if keep < 0:
            raise ValueError(f"SOLVER.CHECKPOINTS_TO_KEEP is {keep}; expected 0 or more.")
        self.keep = keep
        self.partial = partial
        self._keys = keys
        self.last_saved: int | None = None
        # Sorts by the time of its start.
        self.run = f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%S.%f} {secrets.token_hex(4)}"
        self._periodic: list[str] = []

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``{name}.pth`` and tag it as the last.

        Raises:
            OSError: the write failed; the earlier checkpoints are whole.
            ValueError: a state holds what a resume could not read; names where.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        data.update(run=self.run, **kwargs)
        data = plain(data)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        write_atomically(path, lambda file: torch.save(data, file))
        self.tag_last_checkpoint(f"{name}.pth")
        self.last_saved = kwargs.get("iteration")
        self._prune(path)

    def _prune(self, written: str) -> None:
        """Remove all but the last periodic checkpoints of this run; never those of another."""
        if iteration_of(written) is None:
            return
        self._periodic = [path for path in self._periodic if path != written] + [written]
        while self.keep and len(self._periodic) > self.keep:
            path = self._periodic.pop(0)
            if PathManager.isfile(path):
                PathManager.rm(path)

    def keep_best(self) -> None:
        """Copy the checkpoint that was saved last to ``model_best.pth``.

        Raises:
            OSError: it cannot be read, or the copy not be written.
        """
        with PathManager.open(self.get_checkpoint_file(), "rb") as file:
            path = os.path.join(self.save_dir, BEST)
            write_atomically(path, lambda copy: shutil.copyfileobj(file, copy))

    def read(self, name: str) -> dict[str, Any]:
        """Read a checkpoint of the folder.

        Raises:
            ValueError: it is damaged.
            OSError: it is missing.
        """
        return read_local_copy(os.path.join(self.save_dir, name))

    def get_checkpoint_file(self) -> str:
        """The checkpoint that ``last_checkpoint`` names; "" if that is not one of the folder."""
        return tagged_in(self.save_dir) or ""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Make a checkpoint the one that ``--resume`` takes first."""
        path = os.path.join(self.save_dir, TAG)
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
            raise ValueError(f"{self._keys[0]} is {without_queries(path)!r}: {error}") from error

    def _begin_anew(self) -> None:
        """Keep a later resume from the checkpoints that an earlier run has left in the folder."""
        left = checkpoints_in(self.save_dir) if self.save_to_disk else []
        if left:
            names = [os.path.basename(path) for path in left]
            if PathManager.isfile(os.path.join(self.save_dir, BEST)):
                names.insert(0, BEST)
            self.logger.warning(
                "%s holds %d checkpoints of an earlier run (%s). This run starts anew and will "
                "overwrite those of equal names; was --resume meant?",
                *(self.save_dir, len(names), ", ".join(names[:3] + ["..."] * (len(names) > 3))),
            )
            self.tag_last_checkpoint(NONE_YET)

    def newest(self) -> str | None:
        """The newest checkpoint that is whole, the same on every process; None if there is none.

        Every process must call it; the main one decides.

        Raises:
            ValueError: checkpoints exist and none is whole; on every process.
        """
        found, error = comm.all_gather(
            newest_whole(self.save_dir) if comm.is_main_process() else (None, None)
        )[0]
        if error:
            raise ValueError(error)
        return str(found) if found else None

    def _resume(self, path: str) -> None:
        self.logger.info("Resuming from %s", path)
        checkpoint = read_local_copy(path)
        checkpoint = _with_named_distiller(checkpoint, self.checkpointables)
        missing = [key for key in self.checkpointables if key not in checkpoint]
        if "distillers" in checkpoint and "distillers" not in self.checkpointables:
            raise ResumeError(
                f"--resume: {path} holds distillers: that run was distilled, but this one has no "
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

        # A checkpoint of an earlier version does not name its run: those next to it stay.
        self.run = checkpoint.get("run", self.run)
        if self.keep and self.save_to_disk:
            periodic = [p for p in checkpoints_in(self.save_dir) if iteration_of(p) is not None]
            self._periodic = [p for p in periodic if run_of(p) == self.run]

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
        # Detectron2 main takes what stands after a "?" in MODEL.WEIGHTS for options.
        url: Any = getattr(self, "_parsed_url_during_load", None)
        options = parse_qs(url.query) if url else {}
        if options.pop("matching_heuristics", None) == ["True"]:
            data["matching_heuristics"] = True
        if options:
            raise ValueError(
                f"{self._keys[0]} is {without_queries(url.geturl())!r}, with the unknown options "
                f"{sorted(options)}; expected none, or '?matching_heuristics=True'."
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
                f"start from random ones, or {self._keys[1]} True to start these keys from "
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
