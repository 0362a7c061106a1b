"""A remote file system of Detectron2's PathManager."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler


class Store(PathHandler):
    """{prefix}x is {root}/x, with the functions that iopath's own S3PathHandler has.

    A query is ignored, as that of a signed URL is once it is checked. Local copies are kept: only
    ``force`` brings one up to date.
    """

    def __init__(self, prefix: str, root: Path, *, append: bool) -> None:
        super().__init__()
        self._prefix, self._root, self._append = prefix, root, append

    def _at(self, path: str) -> Path:
        return self._root / path.removeprefix(self._prefix).split("?")[0]

    def _get_supported_prefixes(self) -> list[str]:
        return [self._prefix]

    def _get_local_path(self, path: str, force: bool = False, **_: Any) -> str:
        copy = self._root.parent / "cache" / self._at(path).name
        copy.parent.mkdir(exist_ok=True)
        if force or not copy.exists():
            shutil.copy(self._at(path), copy)
        return str(copy)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: Any) -> Any:
        assert self._append or not set("a+") & set(mode)
        return open(self._at(path), mode, buffering=buffering)

    def _exists(self, path: str, **_: Any) -> bool:
        return self._at(path).exists()

    def _isfile(self, path: str, **_: Any) -> bool:
        return self._at(path).is_file()

    def _isdir(self, path: str, **_: Any) -> bool:
        return self._at(path).is_dir()

    def _ls(self, path: str, **_: Any) -> list[str]:
        return os.listdir(self._at(path))

    def _mkdirs(self, path: str, **_: Any) -> None:
        self._at(path).mkdir(parents=True, exist_ok=True)

    def _rm(self, path: str, **_: Any) -> None:
        self._at(path).unlink()


@contextlib.contextmanager
def store(folder: Path, *, prefix: str = "store://", append: bool = False) -> Iterator[Path]:
    """The folder whose files are those of the store; ``append`` for one that can add to files."""
    root = folder / "store"
    root.mkdir()
    PathManager.register_handler(Store(prefix, root, append=append))
    try:
        yield root
    finally:
        del PathManager._path_handlers[prefix]
