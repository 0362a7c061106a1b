"""Weights of small teachers, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import TEACHER_FPN, save_weights, stock_config

WeightsOf = Callable[[str], Path]


@pytest.fixture(scope="session")
def weights_of(tmp_path_factory: pytest.TempPathFactory) -> WeightsOf:
    """The file of a small teacher's weights, by its kind."""
    folder = tmp_path_factory.mktemp("teachers")

    def get(kind: str) -> Path:
        path = folder / f"{kind}.pth"
        return path if path.exists() else save_weights(stock_config(kind, fpn=TEACHER_FPN), path)

    return get
