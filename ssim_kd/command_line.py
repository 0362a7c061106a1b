"""The command line of every program: read before torch and Detectron2 are imported.

Importing those takes seconds; help and wrong arguments are answered without them.
"""

import argparse
import itertools
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

# Of torch and Detectron2, about each other; a user can do nothing about them.
_NOISE = (
    r"`torch\.jit\.\w+` is deprecated",
    "torch.meshgrid: in an upcoming release",
    "TypedStorage is deprecated",
    "`broadcast_buffers` is deprecated",
    ".*USDT",
)

FORMATS = ("stock", "torchscript", "onnx", "int8")

_EXAMPLES = """
Examples:

Distil from a better detector, and train the control without it:
    $ {program} --config-file cfg.yaml --num-gpus 8 --teacher output/teacher \\
        OUTPUT_DIR output/distilled
    $ {program} --config-file cfg.yaml --num-gpus 8 OUTPUT_DIR output/plain

Your own data in COCO format, 12 epochs, another option of the config:
    $ {program} --config-file cfg.yaml --data data.yaml --epochs 12 --batch 8 \\
        --teacher COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml MODEL.DISTILL.LOSS_WEIGHT 2.0

Go on with a run that was stopped; evaluate its student:
    $ {program} --config-file cfg.yaml --teacher output/teacher --resume OUTPUT_DIR output/distilled
    $ {program} --config-file output/distilled/config.yaml --eval-only \\
        MODEL.WEIGHTS output/distilled/model_final.pth

Several machines:
    (machine0)$ {program} --machine-rank 0 --num-machines 2 --dist-url <URL> [--other-flags]
    (machine1)$ {program} --machine-rank 1 --num-machines 2 --dist-url <URL> [--other-flags]
"""

_EXPORT = """
Export a trained student: stock config and weights, TorchScript, ONNX, 8-bit ONNX.

    ssim-kd export --config-file output/distilled/config.yaml --output output/export \\
        MODEL.WEIGHTS output/distilled/model_final.pth

writes student.yaml, model.pth, model.ts, model.onnx and export.json, which says how far the
exported models' detections are from PyTorch's on images of DATASETS.TEST. `--formats int8` adds
model_int8.onnx, calibrated on images of DATASETS.TRAIN; `--evaluate` the AP of each. A detector of
any stock config is exported as well, YAML or LazyConfig.
"""

_VISUALIZE = """
Show what distillation compares, and how far the student is from its teacher, level by level.

    ssim-kd visualize --config-file output/distilled/config.yaml --output output/pictures \\
        MODEL.WEIGHTS output/distilled/model_final.pth

draws one sheet an image of DATASETS.TEST (PNG), a row a level: student and teacher activation, the
SSIM loss, its luminance, contrast and structure, and the l2 loss next to it, all over the image;
and index.html with the means. The adapters are those of the training: the weights must be a
checkpoint that it wrote. --teacher, --data as for a training.
"""

_REPORT = """
Write the page of a training, or of several side by side.

    ssim-kd report output/distilled
    ssim-kd report output/ssim output/pkd output/l2 --control output/plain --output all.html

The folders are those of trainings, their OUTPUT_DIR. docs/report.md has what the page shows.
"""

_COMPARE = """
Compare methods with seeds: trains what a study asks for, and writes its statistics.

    ssim-kd compare study.yaml

What has a record is not trained again: stop it whenever you like, and start it again. Results go
into results/NAME.json next to the study after each training; tables and plots are made from that
file (--report makes them without any training).
"""


def quiet_libraries() -> None:
    """Leave out the warnings that importing torch and Detectron2 causes, also in what they log."""
    log = logging.getLogger("torch.utils.cpp_extension")
    log.addFilter(lambda record: "No CUDA runtime" not in record.getMessage())
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)


class _Pairs(argparse.Action):
    """KEY VALUE pairs, which may come in several parts."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest, None) or []), *values])


class _Formats(argparse.Action):
    """Names of formats; KEY VALUE pairs may follow them."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        names = list(itertools.takewhile(lambda text: text.isalnum() and text.islower(), values))
        unknown = [name for name in names or values if name not in FORMATS]
        if unknown:
            raise argparse.ArgumentError(self, f"{unknown}; expected some of {list(FORMATS)}")
        namespace.formats, pairs = names, values[len(names) :]
        if pairs:
            namespace.opts = [*(getattr(namespace, "opts", None) or []), *pairs]


class _Parser(argparse.ArgumentParser):
    """Takes flags between KEY VALUE pairs as well."""

    parse_args = argparse.ArgumentParser.parse_intermixed_args  # type: ignore[assignment]


def _parser(description: str | None, program: str | None, **more: Any) -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog=program, description=description, formatter_class=style, **more)
    # A value, not a flag: argparse itself knows -1 and -0.5, but neither -1e-3 nor -inf.
    parser._negative_number_matcher = re.compile(r"-\.?(\d|inf|nan)", re.IGNORECASE)
    return parser


def argument_parser(
    program: str | None = None, *, description: str | None = None
) -> argparse.ArgumentParser:
    """Detectron2's own arguments, and those of distillation.

    Args:
        program: how it was called; None: ``sys.argv[0]``.
        description: first lines of the help; None: examples at its end.
    """
    epilog = None if description else _EXAMPLES.format(program=program or sys.argv[0])
    parser = _parser(description, program, epilog=epilog)
    add = parser.add_argument
    # As detectron2.engine.default_argument_parser, which cannot be imported without torch.
    add(
        "--config-file",
        default="",
        metavar="FILE",
        help="config file, or its name in the model zoo or below configs",
    )
    add("--resume", action="store_true", help="go on from the last checkpoint of OUTPUT_DIR")
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST")
    add("--num-gpus", type=int, default=1, help="processes on this machine, one a GPU")
    add("--num-machines", type=int, default=1, help="number of machines")
    add("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    # The same for a user, so that a port that is taken shows processes that were left running.
    port = 2**15 + 2**14 + hash(os.getuid() if sys.platform != "win32" else 1) % 2**14
    add(
        "--dist-url",
        default=f"tcp://127.0.0.1:{port}",
        help="tcp://HOST:PORT of the first machine; auto: any free port of this one",
    )
    add(
        "--eval-teacher",
        action="store_true",
        help="evaluate the teacher of MODEL.DISTILL.TEACHER by itself on DATASETS.TEST",
    )
    add(
        "--teacher",
        default="",
        metavar="NAME",
        help="distil from this teacher: the folder of a run, a name of the model zoo (.yaml or "
        ".py), a config file with weights next to it, or a checkpoint; the same as "
        "MODEL.DISTILL.TEACHER.NAME",
    )
    add(
        "--data",
        default="",
        metavar="DATA.YAML",
        help="train and test on the COCO-format sets of this file; the same as DATASETS.DATA_FILE",
    )
    add("--epochs", type=float, help="length of the training; the same as SOLVER.EPOCHS")
    add(
        "--batch",
        type=int,
        help="images a step, all processes together; the learning rate is scaled linearly from the "
        "config's, and without --epochs the schedule as well",
    )
    add(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="run this module or .py file of yours first: it registers a method, and its "
        "add_config(cfg) adds the keys",
    )
    add(
        "opts",
        default=[],
        nargs="*",
        help='overrides: KEY VALUE pairs; "path.key=value" for a LazyConfig',
    )
    return parser


def is_evaluation(args: argparse.Namespace) -> bool:
    """Whether a command line trains nothing."""
    return any(getattr(args, flag, False) for flag in ("eval_only", "eval_teacher"))


def export_parser(program: str | None = None) -> argparse.ArgumentParser:
    """Of ``ssim-kd export``."""
    parser = _parser(_EXPORT, program)
    add = parser.add_argument
    add("--config-file", required=True, help="of the training, or a stock one")
    add("--output", type=Path, required=True, help="folder")
    add("--import", dest="imports", action="append", default=[], help="as for a training")
    add("--data", default="", metavar="DATA.YAML", help="as for a training")
    add(
        "--formats",
        nargs="+",
        action=_Formats,
        metavar="FORMAT",
        default=FORMATS[:3],
        help=f"of {', '.join(FORMATS)}; default: the first three",
    )
    add("--batch", type=int, default=1, help="images that the model takes at once")
    add("--compare", type=int, default=16, help="images of DATASETS.TEST to compare on; 0: none")
    add("--calibrate", type=int, default=64, help="images of DATASETS.TRAIN for int8")
    add("--evaluate", action="store_true", help="AP of each on DATASETS.TEST")
    add(
        "opts",
        nargs="*",
        action=_Pairs,
        help="overrides, KEY VALUE: MODEL.WEIGHTS model.pth; of a LazyConfig: "
        "train.init_checkpoint=model.pth",
    )
    return parser


def visualize_parser(program: str | None = None) -> argparse.ArgumentParser:
    """Of ``ssim-kd visualize``."""
    parser = argument_parser(program, description=_VISUALIZE)
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--images", type=int, default=4, help="how many, the first of the set")
    return parser


def report_parser(program: str | None = None) -> argparse.ArgumentParser:
    """Of ``ssim-kd report``."""
    parser = _parser(_REPORT, program)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a training")
    add("--teacher", type=Path, metavar="RUN", help="the teacher's training")
    add("--control", type=Path, metavar="RUN", help="a plain run to compare with")
    add("--output", type=Path, metavar="FILE", help="RUN/report.html by default")
    return parser


def compare_parser(program: str | None = None) -> argparse.ArgumentParser:
    """Of ``ssim-kd compare``."""
    parser = _parser(_COMPARE, program)
    add = parser.add_argument
    add("study", type=Path, help="a .yaml file: see studies/README.md")
    add("--stages", nargs="+", help="of the study; default: all, in its order")
    add("--arms", nargs="+", help="of the stages; default: all")
    add("--seeds", nargs="+", type=int, help="of the stages; default: all")
    add("--records", type=Path, help="default: results/NAME.json next to the study")
    add("--docs", type=Path, help="page to write, default: NAME.md next to the records")
    add(
        "--output",
        type=Path,
        help="of the trainings, default: output/NAME next to the study",
    )
    add("--cluster", default="local", choices=["local", "slurm"], help="submitit's executor")
    add("--workers", type=int, default=2, help="trainings at once (2)")
    add("--submitit", nargs="+", default=[], metavar="NAME=VALUE", help="e.g. slurm_partition=gpu")
    add("--report", action="store_true", help="train nothing")
    add("--opts", nargs="+", default=[], metavar="KEY VALUE", help="place and speed: MODEL.DEVICE")
    return parser
