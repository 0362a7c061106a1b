"""The weights of small teachers, as for the tests of modeling."""

from tests.modeling.conftest import weights_of  # noqa: F401
