"""ICD: Instance-Conditional Knowledge Distillation for Object Detection."""

from .config import add_config
from .distiller import ICDDistiller

SUMMARY = {
    "method": "ICD",
    "paper": "Kang et al., NeurIPS 2021",
    "levels": "all levels of the FPN, as one sequence",
    "needs": "ground truth; an FPN of one width",
}

__all__ = ["SUMMARY", "ICDDistiller", "add_config"]
