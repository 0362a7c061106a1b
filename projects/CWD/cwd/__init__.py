"""CWD: Channel-wise Knowledge Distillation for Dense Prediction."""

from .config import add_config
from .distiller import CWDDistiller, channel_kl

__all__ = ["CWDDistiller", "add_config", "channel_kl"]
