"""ReviewKD: Distilling Knowledge via Knowledge Review."""

from .config import add_config
from .distiller import ReviewKDDistiller

SUMMARY = {
    "method": "ReviewKD",
    "paper": "Chen et al., CVPR 2021",
    "levels": "all levels of the FPN, two or more",
    "needs": "",
}

__all__ = ["SUMMARY", "ReviewKDDistiller", "add_config"]
