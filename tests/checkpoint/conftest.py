"""A file of weights, its tensors, and a model to load it into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers import build, save_weights, stock_config


@pytest.fixture(scope="session")
def path(tmp_path_factory) -> Path:
    return save_weights(stock_config("faster"), tmp_path_factory.mktemp("weights") / "good.pth")


@pytest.fixture(scope="session")
def state(path) -> dict[str, torch.Tensor]:
    return torch.load(path)["model"]


@pytest.fixture(scope="session")
def other_model() -> nn.Module:
    """The architecture of the file, with other weights."""
    return build(stock_config("faster"), seed=7)


@pytest.fixture
def model(other_model) -> nn.Module:
    with torch.no_grad():
        for value in other_model.state_dict().values():
            value.fill_(5)
    return other_model
