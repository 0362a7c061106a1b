"""The teacher's config and weights, out of what the student's config says of them."""

from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from ..config import add_distill_config, student_config
from ..config_files import merge_file


def teacher_config(cfg: CfgNode) -> CfgNode:
    """The teacher's own config, out of ``MODEL.DISTILL.TEACHER``.

    Returns:
        a frozen config whose ``MODEL.WEIGHTS`` are the teacher's.

    Raises:
        ValueError: a config or weights that are not given, or cannot be found or understood.
    """
    node = cfg.MODEL.DISTILL.TEACHER
    name = node.CONFIG_FILE
    if not name:
        raise ValueError(
            "MODEL.DISTILL.TEACHER.CONFIG_FILE is empty; expected a name of the model zoo (e.g. "
            "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml) or a .yaml file."
        )
    teacher = get_cfg()
    add_distill_config(teacher)
    # A student that was distilled by another project can be a teacher: its keys are not ours.
    teacher.MODEL.DISTILL.set_new_allowed(True)
    path = name if PathManager.isfile(name) else _zoo_config(name)
    if path is None:
        raise ValueError(
            f"MODEL.DISTILL.TEACHER.CONFIG_FILE is {name!r}: neither a file nor a name of the "
            "model zoo (e.g. COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml)."
        )
    try:
        merge_file(teacher, path)
        teacher.merge_from_list(list(node.OPTS))
    except Exception as error:
        raise ValueError(
            f"The teacher's config cannot be read: MODEL.DISTILL.TEACHER.CONFIG_FILE {name!r} with "
            f"OPTS {list(node.OPTS)}: {error}"
        ) from error
    teacher.MODEL.WEIGHTS = _weights(node.WEIGHTS, name)
    teacher.MODEL.DEVICE = "cpu"
    return student_config(teacher)


def _zoo_config(name: str) -> str | None:
    try:
        return str(model_zoo.get_config_file(name))
    except RuntimeError:
        return None


def _weights(weights: str, config_file: str) -> str:
    """The file or URL of the teacher's weights."""
    name = weights or config_file
    if weights and not weights.endswith((".yaml", ".yml")):
        return weights
    try:
        return str(model_zoo.get_checkpoint_url(name))
    except RuntimeError as error:
        raise ValueError(
            f"MODEL.DISTILL.TEACHER.WEIGHTS is {weights!r} and the model zoo has no weights for "
            f"{name!r}; expected a .pth or .pkl file, a URL, or a name of the model zoo."
        ) from error
