"""The embedded data set: handwritten digits to detect, made on first use, in COCO's format.

Making it needs the extra ``digits``: ``pip install 'ssim_kd[digits]'``.
"""

from .dataset import ensure_digits, register_digits

__all__ = ["ensure_digits", "register_digits"]
