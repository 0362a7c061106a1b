"""Shares the data, configs and teacher of the engine's tests."""

from tests.engine.conftest import world

__all__ = ["world"]
