"""Precomputed proposals: as Detectron2 reads them, but without running code of their file."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.data.build import load_proposals_into_dataset
from detectron2.structures import BoxMode

from ssim_kd.data.proposals import add_proposals
from ssim_kd.data.training_sets import train_records

RECORDS = [{"image_id": 7, "file_name": "7.png"}, {"image_id": "b", "file_name": "b.png"}]


def proposals(**more: Any) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    counts = {"b": 3, "7": 5, "of another set": 1}
    return {
        "ids": list(counts),
        "boxes": [draw.random((n, 4), dtype=np.float32) for n in counts.values()],
        "objectness_logits": [draw.random(n) for n in counts.values()],
        **more,
    }


def write(folder: Path, content: Any, protocol: int = 2) -> str:
    path = folder / "p.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    return str(path)


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("mode", [{}, {"bbox_mode": BoxMode.XYWH_ABS}, {"bbox_mode": 1}])
@pytest.mark.parametrize("old", [False, True])
def test_add_proposals_as_detectron2(old, mode, protocol, tmp_path) -> None:
    content = proposals(**mode)
    if old:
        content["indexes"], content["scores"] = content.pop("ids"), content.pop("objectness_logits")
    path = write(tmp_path, content, protocol)
    expected = load_proposals_into_dataset(copy.deepcopy(RECORDS), path)
    for ours, theirs in zip(add_proposals(copy.deepcopy(RECORDS), path), expected, strict=True):
        assert ours.keys() == theirs.keys() and ours.pop("image_id") == theirs.pop("image_id")
        for key, value in theirs.items():
            assert np.array_equal(ours[key], value) and type(ours[key]) is type(value)


class Code:
    def __reduce__(self) -> Any:
        return exec, ("open('ran', 'w')",)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (proposals(x=Code()), r"p\.pkl .* builtins\.exec, which is neither tensor nor array"),
        ({"boxes": []}, r"p\.pkl .* ids"),
        ([], r"p\.pkl"),
        ({**proposals(), "ids": ["b", "8", "9"]}, r"p\.pkl .* image 7"),
        ({**proposals(), "objectness_logits": [np.zeros(1)] * 3}, r"p\.pkl .* image 7"),
    ],
)
def test_train_records_names_unfit_proposals(content, match, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    DatasetCatalog.register("of proposals", lambda: copy.deepcopy(RECORDS))
    try:
        with pytest.raises(ValueError, match="DATASETS.TRAIN.*" + match):
            train_records(
                "of proposals",
                filter_empty=False,
                proposal_files=[write(tmp_path, content)],
                check_consistency=False,
            )
    finally:
        DatasetCatalog.remove("of proposals")
    assert not Path("ran").exists()
