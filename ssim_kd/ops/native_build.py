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
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")


class BuildError(RuntimeError):
    """There is no usable C compiler; the message says what happened."""


def build(sources: Sequence[Path], **macros: int) -> ctypes.CDLL:
    """The shared library of some C files, by the compiler that CC names or the first on the path.

    It is made anew in each process, in about a second: a library kept for later could meet another
    processor on the next node of a cluster, and half a file where two processes write it.

    Raises:
        BuildError: no compiler was found, it failed, or what it made cannot be loaded.
    """
    named = shlex.split(os.environ.get("CC", ""))
    compiler = named or [found for found in COMPILERS if shutil.which(found)][:1]
    if not compiler:
        raise BuildError(f"no C compiler: CC is not set, and none of {COMPILERS} is on the path")
    files = [str(source) for source in sources]
    defined = [f"-D{name}={value}" for name, value in macros.items()]
    with tempfile.TemporaryDirectory(prefix="ssim_kd_") as folder:
        library = os.path.join(folder, "native.so")
        for threads in (["-fopenmp"], []):  # clang often comes without
            command = [*compiler, *FLAGS, *threads, *defined, *files, "-o", library]
            try:
                run = subprocess.run(command, capture_output=True, text=True, timeout=300)
                if run.returncode == 0:
                    return ctypes.CDLL(library)  # stays loaded when the file goes
                problem = f"'{shlex.join(command)}' failed: {run.stderr.strip()[-500:]}"
            except (OSError, subprocess.TimeoutExpired) as error:
                problem = f"'{shlex.join(command)}' gave no library: {error}"
    raise BuildError(problem)
