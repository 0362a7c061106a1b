"""Data, configs and a teacher for runs of the trainer, made once."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from detectron2.utils.logger import setup_logger

from tests.engine.runs import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """A run has its loggers write into its folder and not propagate; not beyond its test."""
    yield
    for name in ("detectron2", "fvcore", "ssim_kd"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    setup_logger.cache_clear()
