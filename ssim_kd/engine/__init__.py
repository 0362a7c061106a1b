"""Training and evaluation."""

import warnings

# Of torch and Detectron2, on what they call in each other; a user can do nothing about them. Before
# the imports below, which cause the first of them.
for _message in (
    "`torch.jit.script` is deprecated",
    "torch.meshgrid: in an upcoming release",
    "TypedStorage is deprecated",
    "`broadcast_buffers` is deprecated",
    ".*USDT",
):
    warnings.filterwarnings("ignore", message=_message)

from .arguments import argument_parser  # noqa: E402
from .config_loading import load_config  # noqa: E402
from .defaults import main, run  # noqa: E402
from .distill import distill  # noqa: E402
from .trackers import MLflowWriter, WandbWriter  # noqa: E402
from .trainer import DistillTrainer  # noqa: E402

__all__ = [
    "DistillTrainer",
    "MLflowWriter",
    "WandbWriter",
    "argument_parser",
    "distill",
    "load_config",
    "main",
    "run",
]
