"""The examples in the docstrings of the public losses."""

import doctest
import importlib
import pkgutil

import pytest
import torch

from ssim_kd import losses


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(losses.__path__)])
def test_docstring_examples(name):
    module = importlib.import_module(f"ssim_kd.losses.{name}")
    with torch.random.fork_rng():
        result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.failed == 0
