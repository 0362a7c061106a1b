"""Random streams: the same numbers on every version of the libraries."""

import numpy as np

from ssim_kd.data.digits.random_stream import Stream

GOLDEN_UNITS = [0.612145161880767, 0.5633667610075984, 0.7938437756342841]
GOLDEN_DISCRETE = [[1, 3, 0, 2, 5, 4], 8]


def test_stream_golden_numbers():
    stream = Stream(3, 0, 7)
    numbers = [stream.unit() for _ in range(3)]
    np.testing.assert_array_equal(numbers, GOLDEN_UNITS)
    assert [Stream(5).permutation(6), Stream(5).integer(1, 9)] == GOLDEN_DISCRETE


def test_stream_distributions():
    stream = Stream(1)
    bells, units = stream.bells(200, 200), stream.uniforms(200, 200)
    assert abs(bells.mean()) < 0.02 and abs(bells.std() - 1) < 0.02
    assert units.min() >= 0 and units.max() < 1 and abs(units.mean() - 0.5) < 0.01
    assert {Stream(i).integer(2, 4) for i in range(60)} == {2, 3, 4}
    assert all(14 <= Stream(i).log_uniform(14, 96) < 96 for i in range(60))
