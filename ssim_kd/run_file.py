"""run.json: what a training is, written as it starts, for reports and comparisons."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .sharing import without_queries
from .writing import is_remote, write_atomically

RUN_FILE = "run.json"


def write_run_file(folder: str, facts: Mapping[str, Any]) -> None:
    """Add facts to the ``run.json`` of a folder; those that it has by these names are replaced.

    Args:
        folder: of a training; it may be remote.
        facts: values of JSON, without the queries of URLs in the file.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        before = {} if is_remote(folder) else read_run_file(Path(folder))
    except ValueError:
        before = {}
    text = without_queries(json.dumps({**before, **facts}, indent=1, ensure_ascii=False))
    path = os.path.join(folder, RUN_FILE)
    write_atomically(path, lambda file: file.write(text.encode() + b"\n"))


def read_run_file(folder: Path) -> dict[str, Any]:
    """The facts of a training's ``run.json``.

    Returns:
        - **ssim_kd**, **commit**: version and commit; the commit is "" without a checkout, and ends
          with "+" if files of it had changed.
        - **command**: of the last start, for a shell.
        - **config**: the kind of config: "YAML", "LazyConfig" or "Python".
        - **seed**: of the run, also if it was drawn.
        - **weights**: that the student started from; "" for none.
        - **teacher**: its "name", the "weights" that were taken and their "sha256"; None without.
        - **test_sets**: of those in COCO format, by name: [json file, image folder].
        - **environment**: Detectron2's table of versions and devices.
        - **peak_memory_mb**: of the main process's GPU, once the training is over.

        {} if the file does not exist: a training of an older version.

    Raises:
        ValueError: the file cannot be read.
    """
    path = folder / RUN_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no keys")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return found
