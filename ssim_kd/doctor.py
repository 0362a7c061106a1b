"""``ssim-kd doctor``: whether this machine is ready, what is missing, and what to do."""

import argparse
import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable

import torch

from ssim_kd.data import check_datasets
from ssim_kd.engine import DistillTrainer
from ssim_kd.engine.defaults import recipe_of
from ssim_kd.engine.recipe import ConfigRecipe
from ssim_kd.losses import ssim_loss
from ssim_kd.projects import add_project_configs

#: (whether all is well, what was found, what to do)
Finding = tuple[bool, str, str]


def check_versions() -> Finding:
    """Python, PyTorch and Detectron2."""
    import detectron2

    found = f"Python {sys.version.split()[0]}, torch {torch.__version__}, Detectron2 "
    found += detectron2.__version__
    fits = (3, 10) <= sys.version_info[:2] <= (3, 12) and torch.__version__ >= "2.8"
    return fits, found, "Expected Python 3.10 to 3.12 and torch 2.8 or newer."


def check_gpu() -> Finding:
    """A GPU that PyTorch can use."""
    if not torch.cuda.is_available():
        return False, "no GPU that PyTorch can use", "Training runs on the CPU, slowly."
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return True, f"{len(names)} GPUs: {', '.join(sorted(set(names)))}", ""


def check_operators() -> Finding:
    """Detectron2's compiled operators."""
    advice = (
        "Only deformable convolution and rotated boxes need them: build Detectron2 as its "
        "INSTALL.md says."
    )
    try:
        operators = importlib.import_module("detectron2._C")
        return hasattr(operators, "nms_rotated"), "compiled operators of Detectron2", advice
    except ImportError:
        return False, "compiled operators of Detectron2: none", advice


def check_kernels() -> Finding:
    """The fast form of the SSIM loss on this machine's device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    impl = "triton" if device == "cuda" else "native"
    maps = torch.rand(1, 2, 16, 16, device=device)
    try:
        ssim_loss(maps, maps, impl=impl)
    except RuntimeError as error:
        return False, f"fast SSIM loss on {device}: {error}", "It runs in a slower form."
    return True, f"fast SSIM loss on {device}: {impl}", ""


def check_disk(folder: str) -> Finding:
    """Room for checkpoints."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    free = shutil.disk_usage(folder).free / 2**30
    return free > 5, f"{free:.0f} GiB free at {folder}", "Checkpoints of R-50 take 0.3 GiB each."


def check_extras() -> Finding:
    """Optional packages."""
    names = {"timm": "timm", "detr": "transformers", "export": "onnxruntime", "study": "optuna"}
    names |= {"digits": "sklearn", "report": "jinja2", "mlflow": "mlflow", "wandb": "wandb"}
    names |= {"fast-eval": "faster_coco_eval", "slurm": "submitit"}
    missing = [x for x, package in names.items() if importlib.util.find_spec(package) is None]
    advice = f"pip install 'ssim_kd[{','.join(missing)}]', if you need them."
    return not missing, f"extras: {', '.join(sorted(set(names) - set(missing))) or 'none'}", advice


def check_teacher(recipe: ConfigRecipe) -> Finding:
    """The teacher's config and weights."""
    name, weights = recipe.teacher_names[0], recipe.teacher_weights()
    there = "://" in weights or os.path.isfile(weights)
    return there, f"teacher: {name}, weights {weights}", "The file is not there."


def check_data(recipe: ConfigRecipe) -> Finding:
    """The data sets of the config."""
    found = check_datasets(recipe.needs(), train=True, **recipe.own)
    return True, "; ".join(map(str, found)), ""


def main(args: argparse.Namespace) -> int:
    """Print a line a check; the arguments are those of a training.

    Returns:
        1 if the versions, the config, its teacher or its data cannot be used, else 0.
    """
    ready = _report(check_versions, needed=True)
    for check in (check_gpu, check_operators, check_kernels, check_extras):
        _report(check)
    if not (args.config_file or args.data or args.teacher):
        return int(not ready)
    try:
        recipe = recipe_of(args, add_project_configs, DistillTrainer)
    except Exception as error:
        print(f"[fail] config: {error}")
        return 1
    _report(lambda: check_disk(recipe.folder))
    ready &= _report(lambda: check_data(recipe), needed=True)
    if any(recipe.teacher_names):
        ready &= _report(lambda: check_teacher(recipe), needed=True)
    return int(not ready)


def _report(check: Callable[[], Finding], *, needed: bool = False) -> bool:
    try:
        well, found, advice = check()
    except Exception as error:
        well, found, advice = False, str(error), ""
    print(f"[{'ok' if well else 'fail' if needed else 'note'}] {found}")
    if not well and advice:
        print(f"       {advice}")
    return well


if __name__ == "__main__":
    from ssim_kd.command_line import argument_parser

    sys.exit(main(argument_parser().parse_args()))
