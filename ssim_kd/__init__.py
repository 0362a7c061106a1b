"""Knowledge distillation of object detectors: an extension of Detectron2."""

import importlib.util

_spec = importlib.util.find_spec("detectron2")
# A folder that is merely named detectron2 (a checkout beside the working directory) is found too,
# without an origin.
if _spec is None or _spec.origin is None:
    raise ImportError(
        "ssim_kd needs Detectron2, which is not installed. Either build it as its INSTALL.md "
        "says (0.6 or the main branch, with compiled operators), or install the pure-Python "
        "build of 0.6 from a checkout of ssim_kd: pip install ./third_party/detectron2",
        name="detectron2",
    )
del _spec

__version__ = "0.1.0"

__all__ = ["__version__"]
