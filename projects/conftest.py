"""The projects' tests run under the same seeds and guards as the core's."""

from tests.conftest import *  # noqa: F403
