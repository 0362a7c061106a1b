"""run.json: written whole, without secrets, read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssim_kd.run_file import read_run_file, write_run_file


def test_write_run_file_adds_to_what_is_there(tmp_path: Path) -> None:
    assert read_run_file(tmp_path) == {}
    write_run_file(str(tmp_path), {"seed": 1, "command": "ssim-kd train"})
    write_run_file(str(tmp_path), {"seed": 2, "peak_memory_mb": 7})
    assert read_run_file(tmp_path) == {"seed": 2, "command": "ssim-kd train", "peak_memory_mb": 7}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_write_run_file_leaves_queries_of_urls_out(tmp_path: Path) -> None:
    url = "https://host/teacher.pth?sig=secret&x=1"
    facts = {"weights": "s3://bucket/a.pth?token=secret", "teacher": {"weights": url}}
    facts["command"] = f"ssim-kd train MODEL.WEIGHTS '{url}' OUTPUT_DIR out? SEED 1"
    write_run_file(str(tmp_path), facts)
    found = read_run_file(tmp_path)
    assert "secret" not in json.dumps(found)
    assert found["teacher"] == {"weights": "https://host/teacher.pth"}
    expected = "MODEL.WEIGHTS 'https://host/teacher.pth' OUTPUT_DIR out? SEED 1"
    assert found["command"].endswith(expected)


@pytest.mark.parametrize("text", ["", "[]", '{"seed": 1', "\x00"])
def test_a_damaged_run_file_is_named_and_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json"):
        read_run_file(tmp_path)
    write_run_file(str(tmp_path), {"seed": 3})
    assert read_run_file(tmp_path) == {"seed": 3}
