"""The l1 and l2 distillers."""

from __future__ import annotations

import pytest
import torch

from tests.modeling.distillers.maps import PADDED, features, make, masks


@pytest.mark.parametrize(("loss", "expected"), [("l1", 1.5), ("l2", 3.5)])
def test_lp_distiller_without_scaling_by_hand(loss, expected) -> None:
    # |differences| 0, 1, 2, 3: their mean is 1.5, that of the squares (0 + 1 + 4 + 9) / 4.
    distiller = make(loss, scaling="none", level_weights=(1.0, 0.0))
    ours = {k: torch.zeros(2, 4, 2, 2) for k in ("p3", "p4")}
    theirs = {k: torch.arange(4.0).view(1, 1, 2, 2).expand(2, 4, 2, 2) for k in ours}
    total, by_level = distiller(ours, theirs, PADDED)
    assert float(total) == float(by_level["p3"]) == expected


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_lp_distiller_does_not_depend_on_the_padding(loss) -> None:
    distiller = make(loss)
    ours, theirs = features(seed=0), features(seed=1)
    expected, _ = distiller(ours, theirs, PADDED)
    for level, mask in masks(PADDED).items():
        theirs[level] = torch.where(mask[:, None], theirs[level], 1e3)
    assert torch.equal(distiller(ours, theirs, PADDED)[0], expected)
