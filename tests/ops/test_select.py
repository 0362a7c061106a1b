"""The choice of the implementation: fallbacks, errors, logging."""

import logging
import tempfile

import pytest
import torch

from ssim_kd.losses import SSIMLoss, check_ssim_options, ssim_loss
from ssim_kd.ops import select
from ssim_kd.ops.cpu import build, launch
from tests.native import needs_compiler

X, Y = (torch.rand(2, 3, 9, 10, generator=torch.Generator().manual_seed(i)) for i in range(2))


@pytest.fixture
def fresh(monkeypatch):
    """As in a new process: nothing was built or logged."""
    launch._library.cache_clear()
    monkeypatch.setattr(select, "_logged", set())
    yield
    launch._library.cache_clear()


@pytest.mark.parametrize(
    "compiler,why",
    [
        ("false", "'false .*' .* status 1"),
        ("/no/such/cc -m64", "/no/such/cc"),
        ("gcc 'x", "No closing quotation"),
    ],
)
def test_choose_impl_with_a_broken_compiler(fresh, monkeypatch, compiler, why):
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(RuntimeError, match=rf"impl='native'.*{why}"):
        ssim_loss(X, Y, impl="native")


def test_choose_impl_without_a_compiler(fresh, caplog, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    with caplog.at_level(logging.INFO, logger="ssim_kd"):
        loss = ssim_loss(X, Y)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for part in ("'eager' on cpu", "'native'", "no C compiler", "CC"):
        assert part in record.message
    assert loss == ssim_loss(X, Y, impl="eager")
    with pytest.raises(RuntimeError, match=r"impl='native'.* no C compiler"):
        SSIMLoss(impl="native")


@pytest.mark.parametrize("where", ["/no/such/folder", "a file"])
def test_choose_impl_without_a_temporary_folder(fresh, monkeypatch, tmp_path, where):
    (tmp_path / "a file").touch()
    monkeypatch.setattr(tempfile, "tempdir", where if where[0] == "/" else str(tmp_path / where))
    assert ssim_loss(X, Y) == ssim_loss(X, Y, impl="eager")
    with pytest.raises(RuntimeError, match=r"impl='native'.* C compiler"):
        ssim_loss(X, Y, impl="native")


@needs_compiler
def test_choose_impl_beyond_the_kernels():
    with pytest.raises(RuntimeError, match=r"window_size.* 25; got 27"):
        ssim_loss(X, Y, window_size=27, impl="native")
    with pytest.raises(RuntimeError, match=r"impl='native'.* float64"):
        ssim_loss(X.double(), Y.double(), impl="native")
    with pytest.raises(RuntimeError, match=r"impl='native'.* CPU.* meta"):
        ssim_loss(X.to("meta"), Y.to("meta"), impl="native")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_check_ssim_options_triton_without_a_device():
    with pytest.raises(RuntimeError, match=r"impl='triton'.* CUDA"):
        check_ssim_options(impl="triton")
    with pytest.raises(RuntimeError, match=r"impl='triton'.* cpu"):
        ssim_loss(X, X, impl="triton")


@needs_compiler
def test_choose_impl_logs_once(caplog, monkeypatch):
    monkeypatch.setattr(select, "_logged", set())
    with caplog.at_level(logging.INFO, logger="ssim_kd"):
        for _ in range(3):
            ssim_loss(X, X)
            ssim_loss(X, X, gamma=2.0)
    assert [r.message.split(":")[0] for r in caplog.records] == ["SSIM loss"] * 2
    assert "'native' on cpu" in caplog.text and "'reference'" in caplog.text
