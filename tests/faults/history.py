"""What a run did, step by step, and whether another did the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.engine.runs import assert_same, checkpoint

Step = dict[str, Any]


def steps(folder: Path, rank: int = 0) -> dict[int, list[Step]]:
    """The recorded steps by iteration: one that was lost to a kill and done again is there twice.

    The last line may be cut short by the kill.
    """
    found: dict[int, list[Step]] = {}
    for line in (folder / f"steps_rank{rank}.jsonl").read_text().splitlines():
        try:
            step = json.loads(line)
        except json.JSONDecodeError:
            continue
        found.setdefault(step["iteration"], []).append(step)
    return found


def assert_same_run(whole: Path, killed: Path, *, ranks: int = 1) -> int:
    """Losses, learning rates, images and final state are equal bit for bit.

    Returns:
        how many steps were done more than once.
    """
    again = 0
    for rank in range(ranks):
        expected, found = steps(whole, rank), steps(killed, rank)
        assert found.keys() == expected.keys()
        for iteration, (step,) in expected.items():
            for other in found[iteration]:
                assert other == step, (iteration, rank)
            again += len(found[iteration]) - 1
    assert_same(checkpoint(whole), checkpoint(killed))
    return again
