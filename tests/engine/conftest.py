"""Data, configs and a teacher for runs of the trainer, made once."""

from __future__ import annotations

import pytest

from tests.engine.runs import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))
