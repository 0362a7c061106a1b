"""The SSIM distiller, and the name under which configs ask for the paper's losses."""

from __future__ import annotations

import torch

from ssim_kd.modeling.distillers import ssim as module
from tests.modeling.distillers.maps import FULL, features, leaves, make


def test_scaling_grad_reaches_the_extrema_alone() -> None:
    gradients = []
    for through in (True, False):
        ours = leaves(seed=0)
        make(scaling_grad=through)(ours, features(seed=1), FULL)[0].backward()
        gradients.append(ours["p3"].grad)
    changed = (gradients[0] - gradients[1]).abs() > 1e-9
    # Only the extreme cells of each channel, two of them, feel the difference.
    assert set(changed.flatten(2).sum(-1).flatten().tolist()) == {2}


def test_levels_smaller_than_the_window_are_logged_once(caplog) -> None:
    caplog.set_level("INFO")
    distiller = make(ssim_options={"window_size": 9})
    for seed in (0, 2):
        distiller(features(seed=seed), features(seed=seed + 1), FULL)
    (message,) = [r.getMessage() for r in caplog.records if "WINDOW_SIZE" in r.getMessage()]
    assert "p4" in message and "6 x 8" in message


def test_ssim_distiller_takes_masks_of_padded_levels_alone(monkeypatch) -> None:
    # A mask of ones is no mask: the fast implementations skip it.
    seen = []
    original = module.pyramid_ssim_loss

    def pyramid_ssim_loss(*args, masks, **kwargs):
        seen.extend(masks)
        return original(*args, masks=masks, **kwargs)

    monkeypatch.setattr(module, "pyramid_ssim_loss", pyramid_ssim_loss)
    loss, _ = make()(features(seed=0), features(seed=1), FULL)
    assert seen == [None, None] and torch.isfinite(loss)
