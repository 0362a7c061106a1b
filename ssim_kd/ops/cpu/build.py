"""Compiles the C kernels for this processor on first use."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


class BuildError(RuntimeError):
    """No usable C compiler was found; the message has the reason."""


def build(sources: Sequence[Path], **macros: int) -> ctypes.CDLL:
    """Compile C files with the compiler in CC, or the first on the path, and load the library.

    Each process compiles anew, which takes about a second. A cached library could be for another
    processor on the next node of a cluster, or incomplete if two processes write it.

    Args:
        sources: the C files.
        macros: integers to define.

    Raises:
        BuildError: no compiler was found, it failed (it needs OpenMP), or the library cannot be
            loaded.
    """
    try:
        # The folder is removed while the library is loaded, which a network file system may refuse.
        with tempfile.TemporaryDirectory(prefix="ssim_kd_", ignore_cleanup_errors=True) as folder:
            return _build_in(folder, sources, macros)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"no library from the C compiler: {error}") from error


def _build_in(folder: str, sources: Sequence[Path], macros: dict[str, int]) -> ctypes.CDLL:
    named = shlex.split(os.environ.get("CC", ""))
    compiler = named or [found for found in COMPILERS if shutil.which(found)][:1]
    if not compiler:
        raise BuildError(f"no C compiler: CC is not set, and none of {COMPILERS} is on the path")
    library = os.path.join(folder, "native.so")
    defined = [f"-D{name}={value}" for name, value in macros.items()]
    files = [str(source) for source in sources]
    command = [*compiler, *FLAGS, *defined, *files, "-o", library]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    if run.returncode != 0:
        raise BuildError(
            f"'{shlex.join(command)}' ended with status {run.returncode}: "
            f"{run.stderr.strip()[-500:] or 'no message'}"
        )
    return ctypes.CDLL(library)
