"""Shares the data, configs and teacher of the engine's tests."""

from tests.engine.conftest import loggers, world

__all__ = ["loggers", "world"]
