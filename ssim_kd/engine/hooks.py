"""Hooks of the trainer."""

import hashlib

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng


class Reseed(HookBase):
    """Seeds every generator before each step from (the trainer's seed, iteration, rank).

    A step then draws the same numbers whether or not the run was interrupted before it.
    """

    def before_step(self) -> None:
        """Seed Python, NumPy and torch."""
        # A hash, since neighbouring seeds give related streams in some generators.
        text = f"{self.trainer.seed}/{self.trainer.iter}/{comm.get_rank()}".encode()
        seed_all_rng(int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little"))
