"""What Detectron2 0.6 needs to run on today's libraries, without compiled operators.

Each patch states how often the text it replaces occurs, and fails where that is not so: a patch
that silently does nothing would surface as a crash, or as a wrong number, far from here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


class PatchError(RuntimeError):
    """A file is not what its patch was written for."""


@dataclass(frozen=True)
class Patch:
    """Replace `old`, a text or a pattern that occurs `count` times in the file `path`, by `new`."""

    path: str
    old: str | re.Pattern[str]
    new: str
    why: str
    count: int = 1

    def apply(self, package: Path) -> None:
        """Patch the file below `package`, the folder `detectron2`."""
        file = package / self.path
        if not file.is_file():
            raise PatchError(f"detectron2/{self.path}: no such file, for the patch: {self.why}")
        before = file.read_text(encoding="utf-8")
        if isinstance(self.old, str):
            shown, found = self.old, before.count(self.old)
            after = before.replace(self.old, self.new)
        else:
            shown = self.old.pattern
            after, found = self.old.subn(self.new, before)
        if found != self.count:
            raise PatchError(
                f"detectron2/{self.path}: expected {self.count} occurrence(s) of {shown!r}, "
                f"found {found}, for the patch: {self.why}"
            )
        file.write_text(after, encoding="utf-8")


# Whole names only: np.bool_ and np.float32 stay.
NUMPY_ALIAS = re.compile(r"\bnp\.(bool|int|float|str)\b")


def _numpy_alias(path: str, count: int) -> Patch:
    why = "NumPy 1.24 has no np.bool, np.int, np.float, np.str"
    return Patch(path, NUMPY_ALIAS, r"\1", why, count)


PATCHES = (
    Patch(
        "data/transforms/transform.py",
        "Image.LINEAR",
        "Image.BILINEAR",
        "Pillow 10 has no Image.LINEAR",
    ),
    _numpy_alias("data/build.py", 2),  # else the class histogram vanishes silently
    _numpy_alias("data/datasets/pascal_voc.py", 1),
    _numpy_alias("evaluation/pascal_voc_evaluation.py", 2),
    _numpy_alias("evaluation/sem_seg_evaluation.py", 7),
    _numpy_alias("structures/masks.py", 3),
    _numpy_alias("utils/video_visualizer.py", 1),
    _numpy_alias("utils/visualizer.py", 3),
    Patch(
        "data/common.py",
        "self._rng.sample(self._fallback_candidates, k=1)",
        "self._rng.sample(list(self._fallback_candidates), k=1)",
        "Python 3.11 does not sample from a set: a crash when a mapper returns None",
    ),
    Patch(
        "engine/hooks.py",
        "torch.optim.lr_scheduler._LRScheduler",
        "torch.optim.lr_scheduler.LRScheduler",
        "PyTorch 2.0 renamed the base class: else its own schedulers are not checkpointed",
        count=2,
    ),
    Patch(
        "export/__init__.py",
        "from .api import *\n",
        "try:\n    from .api import *\nexcept ImportError:  # PyTorch 2 has no Caffe2\n    pass\n",
        "without Caffe2, detectron2.export and detectron2.utils.analysis could not be imported",
    ),
    Patch(
        "evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        "COCOeval_opt = COCOeval  # the C++ evaluation is not built\n",
        "without compiled operators the default COCO evaluation would fail",
    ),
    Patch(
        "model_zoo/model_zoo.py",
        "import pkg_resources\n",
        "",
        "setuptools 82 has no pkg_resources",
    ),
    Patch(
        "model_zoo/model_zoo.py",
        "pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", config_path)\n'
        "    )",
        'os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", config_path)',
        "setuptools 82 has no pkg_resources",
    ),
    Patch(
        "modeling/meta_arch/retinanet.py",
        "get_norm(norm, 1)",
        "get_norm(norm, 32)",
        "GroupNorm's 32 groups do not divide one channel: FCOS could not be built",
    ),
)

STAND_IN = '''"""Stand-in for Detectron2's compiled operators, which this build does not have."""


def get_compiler_version():
    return "none: pure-Python build"


def get_cuda_version():
    return "none: pure-Python build"


def has_cuda():
    return False


def __getattr__(name):
    raise AttributeError(
        f"detectron2._C.{name} is a compiled operator, and this is a pure-Python build of "
        "Detectron2 0.6. Deformable convolution, rotated boxes and the fast COCO evaluation "
        "need an official build: see Detectron2's INSTALL.md."
    )
'''


def apply_patches(package: Path) -> None:
    """Patch `package`, the folder `detectron2`, and add the stand-in for the operators."""
    for patch in PATCHES:
        patch.apply(package)
    stand_in = package / "_C.py"
    if stand_in.exists():
        raise PatchError("detectron2/_C.py: already there, where the stand-in was to be written")
    stand_in.write_text(STAND_IN, encoding="utf-8")
