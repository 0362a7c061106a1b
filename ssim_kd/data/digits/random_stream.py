"""Random streams whose numbers do not change with the versions of the libraries.

NumPy promises that ``SeedSequence`` and the raw output of ``PCG64`` never change, but not what the
methods of ``Generator`` make of it. So only raw integers are taken from NumPy here.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


class Stream:
    """A stream of random numbers, fully determined by a tuple of integers.

    Args:
        key: integers >= 0, for example (seed, split, index of the image). Other keys give
            statistically independent streams.
    """

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def unit(self) -> float:
        """Return a number in [0, 1)."""
        return (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def uniform(self, low: float, high: float) -> float:
        """Return a number in [low, high)."""
        return low + (high - low) * self.unit()

    def log_uniform(self, low: float, high: float) -> float:
        """Return a number in [low, high) whose logarithm is uniform. 0 < low <= high."""
        return float(low * (high / low) ** self.unit())

    def integer(self, low: int, high: int) -> int:
        """Return an integer in [low, high], both included."""
        return low + int(self.unit() * (high - low + 1))

    def permutation(self, length: int) -> list[int]:
        """Return the integers 0 .. length - 1 in random order (Fisher and Yates)."""
        order = list(range(length))
        for last in range(length - 1, 0, -1):
            other = self.integer(0, last)
            order[last], order[other] = order[other], order[last]
        return order

    def uniforms(self, *shape: int) -> NDArray[np.float32]:
        """Return an array of numbers in [0, 1), float32."""
        raw = self._raw(int(np.prod(shape)) * 2).view(np.uint16)
        return (raw[: int(np.prod(shape))].reshape(shape) * np.float32(2.0**-16)).astype(np.float32)

    def bells(self, *shape: int) -> NDArray[np.float32]:
        """Return an array of bell-shaped noise with mean 0 and standard deviation 1, float32.

        Each is the sum of four random bytes: no logarithm or cosine whose last bit depends on the
        machine, and quick.
        """
        count = int(np.prod(shape))
        rows = self._raw(count * 4).view(np.uint8)[: count * 4].reshape(4, count)
        total = rows.sum(axis=0, dtype=np.float32) - np.float32(4 * 127.5)
        return (total / np.float32(np.sqrt(4 * (256**2 - 1) / 12))).reshape(shape)

    def _raw(self, num_bytes: int) -> NDArray[Any]:
        words: NDArray[Any] = np.asarray(self._bits.random_raw((num_bytes + 7) // 8))
        return words.astype("<u8", copy=False)
