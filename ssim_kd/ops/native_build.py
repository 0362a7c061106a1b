"""Compiles C files of ours for the processor at hand, when they are first needed."""

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
    """There is no usable C compiler; the message says what happened."""


def build(sources: Sequence[Path], **macros: int) -> ctypes.CDLL:
    """The shared library of some C files, by the compiler that CC names or the first on the path.

    It is made anew in each process, in about a second: a library kept for later could meet another
    processor on the next node of a cluster, and half a file where two processes write it.

    Raises:
        BuildError: no compiler was found, it failed (it needs OpenMP), or what it made cannot be
            loaded.
    """
    try:
        # The folder goes while the library is loaded, which a network file system may refuse.
        with tempfile.TemporaryDirectory(prefix="ssim_kd_", ignore_cleanup_errors=True) as folder:
            return _build_in(folder, sources, macros)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the C compiler gave no library: {error}") from error


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
            f"'{shlex.join(command)}' ended with status {run.returncode} and said "
            f"{run.stderr.strip()[-500:] or 'nothing'}"
        )
    return ctypes.CDLL(library)
