"""Processes that were spawned, and the one that waits for them."""

import ctypes
import multiprocessing
import os
import signal
import sys
from types import FrameType

from .stopping import Stopped


def forward_sigterm() -> None:
    """Make this process, which waits for those it spawns, pass SIGTERM on to them.

    Before there are any, it ends (:class:`Stopped`).
    """

    def forward(_signal: int, _frame: FrameType | None) -> None:
        children = multiprocessing.active_children()
        for child in children:
            child.terminate()
        if not children:
            raise Stopped

    signal.signal(signal.SIGTERM, forward)


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent ends, however that ends. Linux alone.

    Args:
        parent: its process id. If that has ended already, this process ends here.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
