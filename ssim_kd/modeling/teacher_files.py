"""Finds a teacher's files: a name of the model zoo, a run, a config file or a checkpoint."""

import os

from detectron2 import model_zoo
from detectron2.utils.file_io import PathManager

from ..checkpoint import BEST, is_of_last_run
from ..writing import folder_of
from ..yaml_files import ZOO, near_shipped

KEY = "MODEL.DISTILL.TEACHER.NAME"
EXPECTED = (
    "expected the folder of a run, a name of the model zoo (e.g. "
    "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml), a .yaml or .py file, a checkpoint with a "
    "config.yaml next to it, or an RT-DETR (hf://owner/name, or its folder)."
)
#: Weights that the folder of a run holds. The first that is there is taken: the best known one.
RUN_WEIGHTS = (BEST, "model_final.pth", "model_final.pkl")
#: The config that the folder of a run holds. A .py of a folder is a program, and is not run.
RUN_CONFIG = "config.yaml"


class TeacherNotFoundError(ValueError):
    """The teacher is not on this machine, or not to be run; evaluation does not need it."""


def find_teacher(name: str, weights: str = "") -> tuple[str, str]:
    """Resolve what a user calls a teacher. Every path may be of a handler of PathManager.

    Args:
        name: the folder of a run, a name of the model zoo, a .yaml or .py file, or a checkpoint
            (.pth, .pkl) with the config.yaml of its run next to it.
        weights: a file, a URL or a name of the model zoo; "" for those that belong to ``name``.

    Returns:
        the config's path, and the weights' path or URL.

    Raises:
        TeacherNotFoundError: the config, or weights that belong to it, were not found.
    """
    if not name:
        raise TeacherNotFoundError(f"{KEY} is empty; {EXPECTED}")
    path = os.path.expanduser(name)
    if is_folder(path):
        return _config_in(path, name), _weights_of(weights, path, name)
    if is_file(path):
        if path.endswith((".pth", ".pkl")):
            return _config_in(folder_of(path), name), _weights_of(weights or path, "", name)
        return path, _weights_of(weights, folder_of(path), name)
    try:
        return str(model_zoo.get_config_file(name)), _weights_of(weights or name, "", name)
    except RuntimeError:
        raise TeacherNotFoundError(
            f"{KEY} is {name!r}: neither a file, a folder nor a name of the model zoo"
            f"{near_shipped(name, [ZOO])}; {EXPECTED}"
        ) from None


def is_file(path: str) -> bool:
    """Whether a file is there, also one that a handler of PathManager fetches."""
    try:
        return bool(PathManager.isfile(path))
    except NotImplementedError:  # web addresses: whether it is there is known by fetching it
        try:
            return os.path.isfile(PathManager.get_local_path(path))
        except Exception:
            return False


def is_folder(path: str) -> bool:
    """Whether a folder is there, also one of a handler of PathManager."""
    try:
        return bool(PathManager.isdir(path))
    except NotImplementedError:
        return False


def _config_in(folder: str, name: str) -> str:
    path = os.path.join(folder, RUN_CONFIG)
    if is_file(path):
        return path
    raise TeacherNotFoundError(
        f"{KEY} is {name!r}, but {folder or '.'} holds no {RUN_CONFIG}; {EXPECTED}"
    )


def _weights_of(weights: str, folder: str, name: str) -> str:
    """The weights that were named, or those in a folder, or the zoo's for a name."""
    if weights and not weights.endswith((".yaml", ".yml", ".py")):
        return os.path.expanduser(weights)
    try:
        return str(model_zoo.get_checkpoint_url(weights or name))
    except RuntimeError:
        pass
    found = [os.path.join(folder, file) for file in RUN_WEIGHTS] if not weights else []
    for path in found:
        # An earlier run may have left its own, which config.yaml does not describe.
        if is_file(path) and is_of_last_run(path):
            return path
    raise TeacherNotFoundError(
        f"MODEL.DISTILL.TEACHER.WEIGHTS is {weights!r}: the model zoo has no weights for "
        f"{weights or name!r}"
        + (f", and none of {found} is there, of the run of its config" if found else "")
        + "; "
        "expected a .pth or .pkl file, a URL, or a name of the model zoo."
    )
