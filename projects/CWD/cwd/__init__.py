"""CWD: Channel-wise Knowledge Distillation for Dense Prediction."""

from .config import add_config
from .distiller import CWDDistiller, channel_kl

SUMMARY = {
    "method": "CWD",
    "paper": "Shu et al., ICCV 2021",
    "levels": "p2-p6; RetinaNet p3-p6",
    "needs": "",
}

__all__ = ["SUMMARY", "CWDDistiller", "add_config", "channel_kl"]
