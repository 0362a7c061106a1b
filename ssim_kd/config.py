"""Every config key that ``ssim_kd`` adds to Detectron2's, each with its meaning and values."""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.utils.file_io import PathManager

from .sharing import without_queries
from .writing import write_atomically


def add_distill_config(cfg: CN) -> None:
    """Add the keys of ``MODEL.DISTILL`` and of the data sets to a Detectron2 config, in place.

    Args:
        cfg: a config made by :func:`detectron2.config.get_cfg`.
    """
    _add_model_keys(cfg)
    _add_solver_keys(cfg)
    _add_dataset_keys(cfg)
    # True: after the training a page is written, OUTPUT_DIR/report.html: see docs/report.md.
    cfg.TEST.REPORT = True
    _add_tracking_keys(cfg)
    add_timm_config(cfg)


def student_config(cfg: CN) -> CN:
    """The frozen config of only the student: what stock Detectron2 builds and evaluates."""
    cfg = cfg.clone()
    if cfg.MODEL.META_ARCHITECTURE == "DistilledDetector":
        cfg.defrost()
        cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.DISTILL.STUDENT_META_ARCHITECTURE
    cfg.freeze()
    return cfg


def write_stock_config(
    cfg: CN, path: str, *, weights: str = "", classes: Sequence[str] = ()
) -> None:
    """Write the student's config without the keys of ssim_kd, for stock Detectron2.

    Keys of the user's own (of a backbone that their code registers) and those of a timm backbone
    stay; a comment names them, since Detectron2 has to know them before it merges the file.

    Args:
        cfg: of the training.
        path: a .yaml file.
        weights: MODEL.WEIGHTS; of a file next to it the name, so that both can be moved.
        classes: see :func:`notes_on`.
    """
    stock, ours = get_cfg(), get_cfg()
    add_distill_config(ours)
    if "timm" in cfg.MODEL.BACKBONE.NAME:
        del ours.MODEL["TIMM"]
    further: list[str] = []

    def keep(node: CN, stock: CN, ours: CN, prefix: str = "") -> CN:
        kept = CN()
        for key, value in node.items():
            if key in stock:
                is_node = isinstance(value, CN)
                kept[key] = (
                    keep(value, stock[key], ours[key], f"{prefix}{key}.") if is_node else value
                )
            elif key not in ours:
                further.append(prefix + key)
                kept[key] = value
        return kept

    kept = keep(student_config(cfg), stock, ours)
    kept.MODEL.WEIGHTS, kept.OUTPUT_DIR = weights, stock.OUTPUT_DIR
    comment = notes_on(weights, classes)
    if "MODEL.TIMM" in further:
        comment += _TIMM_COMMENT
    elif further:
        comment += _KEYS_COMMENT.format(keys=", ".join(further))
    text = comment + without_queries(kept.dump())
    write_atomically(path, lambda file: file.write(text.encode()))


def notes_on(weights: str, classes: Sequence[str]) -> str:
    """Comments for the top of a student's config, which has no place for the names of classes.

    Args:
        weights: the file with its weights.
        classes: names in the order of ``pred_classes``; () if they are not known.
    """
    lines = [f"# The weights are in {weights}, next to this file; name it with its folder."]
    # ASCII: YAML also ends a comment at line breaks of Unicode.
    lines += [f"{_CLASSES}{json.dumps([*classes])}"] * bool(classes)
    return "".join(f"{line}\n" for line in lines if weights or line.startswith(_CLASSES))


def add_notes(path: str, weights: str, classes: Sequence[str]) -> None:
    """Write :func:`notes_on` at the top of a file."""
    with PathManager.open(path) as file:
        text = notes_on(weights, classes) + file.read()
    write_atomically(path, lambda file: file.write(text.encode()))


def read_classes(path: str) -> list[str]:
    """The names of the classes that a student's config notes; [] if it notes none."""
    if not PathManager.isfile(path):
        return []
    with PathManager.open(path) as file:
        noted = [line for line in file if line.startswith(_CLASSES)]
    return [str(name) for name in json.loads(noted[0].removeprefix(_CLASSES))] if noted else []


_CLASSES = "# Classes, by number: "
_TIMM_COMMENT = """\
# A backbone of timm. Before it merges this file, stock Detectron2 needs two lines:
#   from ssim_kd.modeling.timm_backbone import add_timm_config
#   add_timm_config(cfg)
"""
_KEYS_COMMENT = """\
# Before it merges this file, stock Detectron2 needs the keys of your own code: {keys}.
"""

# What adds keys to the config of a run, see :func:`share_keys`.
_shared: list[Callable[[CN], None]] = []


def import_method(name: str) -> Callable[[CN], None]:
    """Import a user's method; returns what adds its config keys.

    Args:
        name: of a module that can be imported, or a .py file.

    Raises:
        ValueError: it cannot be imported.
    """
    try:
        if name.endswith(".py"):
            place = f"ssim_kd_method_{Path(name).stem}"
            module = sys.modules.get(place)
            if module is None:  # once in a process: it registers its distiller
                spec = importlib.util.spec_from_file_location(place, Path(name).expanduser())
                assert spec is not None and spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                sys.modules[place] = module
        else:
            module = importlib.import_module(name)
    except Exception as error:
        raise ValueError(
            f"--import {name}: {type(error).__name__}: {error}. Expected a module on Python's "
            "path, or a .py file."
        ) from error
    return getattr(module, "add_config", lambda cfg: None)


def share_keys(add_config: Callable[[CN], None]) -> None:
    """Give the configs of teachers the keys of the run's config as well.

    A backbone with custom config keys can then be a teacher.

    Args:
        add_config: adds keys with their defaults to a config.
    """
    if add_config not in _shared:
        _shared.append(add_config)


def add_shared_keys(cfg: CN) -> None:
    """Add the keys of every function that was given to :func:`share_keys`, in place."""
    for add_config in _shared:
        add_config(cfg)


def _add_model_keys(cfg: CN) -> None:
    distill = cfg.MODEL.DISTILL = CN()

    # False: no teacher is built, and the losses are those of the plain student.
    distill.ENABLED = True
    # The student's own meta-architecture, any that Detectron2 has registered.
    distill.STUDENT_META_ARCHITECTURE = "GeneralizedRCNN"
    # The method: a name in DISTILLER_REGISTRY. "" is "SSIMDistiller". A key that is None means the
    # method's own value, for the student's kind of detector; the run logs it and writes it into its
    # config.yaml.
    distill.NAME = ""
    # Several methods at once, in the place of NAME: each term is a name, and keys of MODEL.DISTILL
    # that hold for this term: [["SSIMDistiller"], ["PKDDistiller", "LOSS_WEIGHT", 6.0,
    # "IN_FEATURES", ["p3"]]]. Their losses add up. [] is the single term NAME.
    distill.TERMS = []
    # Levels that are compared, by name: p2..p7 (FPN) or res2..res5 (below it).
    # [] takes every backbone output that teacher and student share at the same stride.
    distill.IN_FEATURES = None
    # 1x1 convolution on the student's features (phi of the paper):
    # "auto": on the levels whose channels differ; "always": on every level; "none": never.
    distill.ADAPTER = None
    # Min-max scaling of both maps to [0, 1] before they are compared (psi of the paper).
    # Extrema over each "channel" of each sample, over each "sample", over the "batch"; or "none".
    distill.SCALING = "channel"
    # True: the gradient flows through the student's extrema as well.
    distill.SCALING_GRAD = True
    # True: cells that lie wholly in the padding of an image count in no loss.
    distill.MASK_PADDING = True
    # What to do if strides differ at a level: "error", or "bilinear": the teacher's map is
    # resized to the student's.
    distill.RESIZE = "error"
    # One weight a level, in the order of IN_FEATURES. [] is 1 for each.
    distill.LEVEL_WEIGHTS = []
    # Weight of the distillation loss next to the detection losses (lambda of the paper). >= 0.
    # SSIM, l1 and l2 have 4. "auto" is found in training, by GRADIENT_SHARE.
    distill.LOSS_WEIGHT = None
    # Of LOSS_WEIGHT "auto": how many times as large the gradient of the method's loss is as that of
    # the detection losses, at the student's maps. SCHEDULE changes it as it does a weight. >= 0.
    distill.GRADIENT_SHARE = 10.0
    # Of older configs: "ssim", "l1" or "l2" is NAME SSIMDistiller, L1Distiller or L2Distiller.
    distill.LOSS = ""
    # Parts of the student that are copied from the teacher before the first step, after
    # MODEL.WEIGHTS: "fpn", "heads". Their shapes must be equal. Compare such a student only with
    # a plain one that inherits the same.
    distill.INIT_FROM_TEACHER = []

    schedule = distill.SCHEDULE = CN()
    # How LOSS_WEIGHT changes over the training: "constant"; "linear" or "cosine", to LOSS_WEIGHT x
    # END_FACTOR at SOLVER.MAX_ITER; "step", times GAMMA at each of STEPS.
    schedule.NAME = "constant"
    # Of "linear" and "cosine": the last factor, >= 0.
    schedule.END_FACTOR = 0.0
    # Of "step": iterations, growing.
    schedule.STEPS = []
    # Of "step": the factor at each of STEPS.
    schedule.GAMMA = 0.1
    # Iterations in which the weight grows linearly from 0. 0: it begins at once.
    schedule.WARMUP_ITERS = 0
    # Iteration from which on the weight is 0. 0: the distillation never stops.
    schedule.STOP_ITER = 0

    head = distill.HEAD = CN()
    # Methods of heads: weights of class predictions and of boxes. >= 0.
    head.CLS_WEIGHT = None
    head.BOX_WEIGHT = None
    # Methods of R-CNN heads: temperature of the softmax. > 0.
    head.TEMPERATURE = None

    teacher = distill.TEACHER = CN()
    # The teacher: the folder of a run, a name of the model zoo (.yaml or .py), a .yaml or .py
    # (LazyConfig) file, or a checkpoint with its config.yaml next to it; or an RT-DETR of
    # transformers: "hf://owner/name", or its folder. Relative to the working directory or to the
    # folder of --config-file. A .py is a program: it is run if it comes with Detectron2 or
    # ssim_kd, or if the command line or code names it, but not for a config.
    teacher.NAME = ""
    # The former name of NAME.
    teacher.CONFIG_FILE = ""
    # The teacher's weights: a .pth or .pkl file, a URL that Detectron2 knows, or a name of the
    # model zoo. "" takes those that belong to NAME: the zoo's, or a file next to
    # it: model_best.pth, else model_final.pth, else model_final.pkl.
    teacher.WEIGHTS = ""
    # Overrides of the teacher's config: [KEY, VALUE, KEY, VALUE, ...]; of a LazyConfig:
    # ["key=value", ...].
    teacher.OPTS = []
    # Precision of the teacher's forward: "float32", "float16", "bfloat16", or "auto": that of the
    # student's training (half if SOLVER.AMP.ENABLED, else float32).
    teacher.PRECISION = "auto"
    # True: frozen batch norms become part of the convolutions before them.
    teacher.FOLD_BN = True
    # True: channels_last memory format for the teacher; usually faster in half precision on a GPU.
    teacher.CHANNELS_LAST = False
    # True: torch.compile of the teacher. It compiles anew for new image sizes: for training at
    # one size.
    teacher.COMPILE = False
    # AP that the teacher must reach on DATASETS.TEST[0]: it is evaluated once, before training,
    # which does not start if it falls short. 0 asks for none.
    teacher.EXPECTED_AP = 0.0

    ssim = distill.SSIM = CN()
    # Side of the Gaussian window in cells: odd, >= 1. Maps smaller than it: see ssim_loss.
    ssim.WINDOW_SIZE = 11
    # Standard deviation of the Gaussian window, in cells. > 0.
    ssim.SIGMA = 1.5
    # Constants of the formula: C1 = (K1 * DATA_RANGE)^2, C2 = (K2 * DATA_RANGE)^2. >= 0; with
    # both 0 flat maps, however alike, have no SSIM and cost 0.5.
    ssim.K1 = 0.01
    ssim.K2 = 0.03
    # Range of the scaled values: 1 for maps scaled to [0, 1].
    ssim.DATA_RANGE = 1.0
    # Exponents of luminance, contrast and structure, >= 0. 0 leaves the term out.
    ssim.ALPHA = 1.0
    ssim.BETA = 1.0
    ssim.GAMMA = 1.0
    # Border: "same" (mirrored, every cell counts) or "valid" (only whole windows count).
    ssim.PADDING = "same"
    # Implementation: "auto" (the fastest that runs here), "reference", "eager",
    # "native" (a CPU) or "triton" (a GPU).
    ssim.IMPL = "auto"


def _add_solver_keys(cfg: CN) -> None:
    # True: MODEL.WEIGHTS may fit a part of the student's backbone; the rest starts from random
    # values, and the log lists it. False: such weights stop the run.
    cfg.MODEL.WEIGHTS_PARTIAL = False

    solver = cfg.SOLVER
    # Length of the training in epochs, which sets MAX_ITER from the number of training images.
    # STEPS keep their place; WARMUP_ITERS (not below 500, or a quarter of the training) and
    # CHECKPOINT_PERIOD are shortened; keys of MODEL.DISTILL named *_ITERS, *_ITER and STEPS follow.
    # TEST.EVAL_PERIOD becomes an epoch if it is 0 or longer. 0: MAX_ITER is what counts.
    solver.EPOCHS = 0.0
    # Number of parts of a step's images on each process. The parts go through the model one after
    # the other and their gradients add up, for a batch that does not fit into memory.
    solver.ACCUMULATE = 1
    # How many of the periodic checkpoints stay on the disk, the newest ones, with those that an
    # evaluation makes. model_best.pth and model_final.pth stay in addition. 0 keeps all.
    solver.CHECKPOINTS_TO_KEEP = 2
    # Seconds that a run has after SIGTERM or Ctrl-C to finish its step and save; then it is ended.
    solver.GRACE_PERIOD = 25.0
    # Steps with a loss or gradient that is not finite which are skipped before the run stops.
    # 0 stops at the first. More than 0 makes every step wait for its losses.
    solver.MAX_SKIPPED_STEPS = 0


def _add_dataset_keys(cfg: CN) -> None:
    datasets = cfg.DATASETS
    # A YAML file that describes custom data once, for teacher and student: it sets TRAIN, TEST
    # and the number of classes. The same as --data. "": none.
    datasets.DATA_FILE = ""
    # Data sets in COCO format to register: [[name, json file, image folder], ...].
    datasets.REGISTER_COCO = []
    # Boxes of zero area in a training set: "error" stops before training and names them;
    # "drop" leaves them out and says how many (COCO's own train2017 has two).
    datasets.ZERO_AREA_BOXES = "error"
    # Training images that cannot be read: False stops and names data set and file; True takes
    # another image instead, and lists what was skipped at the end.
    cfg.DATALOADER.SKIP_CORRUPT = False

    digits = datasets.DIGITS = CN()
    # The embedded data set, registered as digits_train, digits_val and digits_test.
    # Folder under which it is made on first use.
    digits.ROOT = "datasets/digits"
    # Seed of the renderer, >= 0.
    digits.SEED = 0
    # Side of the square images in pixels.
    digits.IMAGE_SIZE = 256
    # Number of images of (train, val, test).
    digits.NUM_IMAGES = (4000, 500, 1000)
    # Least and greatest number of digits in an image.
    digits.DIGITS_PER_IMAGE = (2, 8)
    # Least and greatest height of a digit in pixels, drawn log-uniformly.
    digits.DIGIT_SIZE = (14, 96)
    # 0: upright clean digits on a plain background, 1: small ones are hard for people as well.
    # Scales rotation, shear, occlusion, noise, blur, low contrast and distractors.
    digits.DIFFICULTY = 1.0


def _add_tracking_keys(cfg: CN) -> None:
    node = cfg.TRACKING = CN()
    # Experiment trackers next to TensorBoard and metrics.json: "mlflow", "wandb" or both. Their
    # own variables (MLFLOW_TRACKING_URI, WANDB_MODE, ...) name the server.
    node.WRITERS = ()
    # Project of W&B, experiment of MLflow. "" is that of WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME,
    # else the tracker's default.
    node.PROJECT = ""
    # Name of the run. "" is the name of the folder OUTPUT_DIR.
    node.RUN_NAME = ""


def add_timm_config(cfg: CN) -> None:
    """Add the keys of ``MODEL.TIMM``, read by the backbones of timm, to a config, in place."""
    node = cfg.MODEL.TIMM = CN()
    # A model of timm that gives a pyramid of features, e.g. "convnext_atto"; a tag after it
    # ("mobilenetv3_large_100.ra_in1k") chooses among timm's weights.
    node.NAME = "mobilenetv3_large_100"
    # Levels that the backbone gives, by stride: res2 (4), res3 (8), res4 (16), res5 (32).
    node.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # Start weights: "" (random), "timm" (timm's own, downloaded once), or a file of the whole
    # model that timm reads (.pth, .safetensors). Not read if MODEL.WEIGHTS is set, which
    # holds all weights.
    node.PRETRAINED = ""
    # Batch norms: "BN", "FrozenBN" or "SyncBN". Other norms stay as they are.
    # MODEL.BACKBONE.FREEZE_AT freezes stages: 0 none, 2 res2 and all below it, ...; 1 what comes
    # before res2, in models with a map of stride 2.
    node.NORM = "FrozenBN"
    # Further arguments of timm.create_model: [NAME, VALUE, ...], e.g. ["drop_path_rate", 0.1], or
    # ["strict_img_size", False] for a Swin transformer.
    node.OPTS = []
