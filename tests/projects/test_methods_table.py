"""The figures of the methods' table: costs, AP and losses out of results as tools write them."""

from __future__ import annotations

import json

import pytest

from tools import methods_table


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Results by hand."""
    times = {"l2": 2.0, "mgd": 3.0, "mgd: backward": 9.0}
    pairs = {"pair": {"times": {k: {"median_s": v} for k, v in times.items()}}}
    runs = {
        "models/t1": {"metrics": {"AP": 70.0}, "commit": "a"},
        "short/none/1": {"arm": "none", "seed": 1, "metrics": {"AP": 30.0}, "commit": "b"},
        "short/none/3": {"arm": "none", "seed": 3, "metrics": {"AP": 31.0}, "commit": "b"},
        "short/mgd/t1/1": {"arm": "mgd", "seed": 1, "metrics": {"AP": 33.0}, "commit": "c"},
        "short/mgd/t1/3": {"arm": "mgd", "seed": 3, "metrics": {"AP": 36.0}, "commit": "c"},
    }
    environment = {"device": "a processor", "threads": 1, "commit": "d"}
    step = {"environment": environment, "size": [64, 96], "images": 1, "pairs": pairs}
    for name, content in (("STEP", step), ("RECORDS", {"runs": runs, "statistics": {}})):
        path = tmp_path / f"{name.lower()}.json"
        path.write_text(json.dumps(content))
        monkeypatch.setattr(methods_table, name, path)
    monkeypatch.setattr(methods_table, "LOSSES", tmp_path / "results" / "losses.json")
    return tmp_path


def test_costs_are_over_l2(results) -> None:
    assert methods_table.costs() == {"l2": 1.0, "mgd": 1.5}


def test_aps_are_of_students_alone(results) -> None:
    assert methods_table.aps() == {"none": {1: 30.0, 3: 31.0}, "mgd": {1: 33.0, 3: 36.0}}


def test_rows_hold_the_figures(results) -> None:
    rows = {row["method"]: row for row in methods_table.rows()}
    mgd, pkd = rows["[MGD](MGD)"], rows["[PKD](PKD)"]
    columns = ("step / l2", methods_table.AP, "parameters")
    assert [mgd[column] for column in columns] == ["1.50", "34.5 (+4.0; 2)", "4.72M"]
    assert [pkd[column] for column in columns] == ["-", "-", "0"]


def test_notes_name_seeds_commits_and_the_plain_student(results) -> None:
    notes = methods_table.notes()
    for text in ("30.0, 31.0", "commits c.", "commit d", "64 x 96"):
        assert text in notes


def test_measured_holds_the_arms_of_a_method_s_distillers(results) -> None:
    assert methods_table.measured("mgd") == "No run on the digits is recorded."
    content = json.loads(methods_table.RECORDS.read_text())
    name, terms = "MODEL.DISTILL.NAME", [["SSIMDistiller"], ["MGDDistiller", "LOSS_WEIGHT", 1.0]]
    for arm, opts in (
        ("mgd", {name: "MGDDistiller"}),
        ("both", {"MODEL.DISTILL.TERMS": terms}),
        ("pkd", {name: "PKDDistiller"}),
    ):
        run = {"arm": arm, "seed": 5, "metrics": {"AP": 1.0}, "commit": "e", "opts": opts}
        content["runs"][f"own/{arm}/5"] = run
    gains = {"n": 2, "mean": 4.0, "low": -1.25, "high": 9.25}, {"n": 1, "mean": -2.0}
    content["statistics"]["stage"] = {
        "arms": {a: {"AP": {"mean": m}} for a, m in (("none", 30.5), ("mgd", 34.5), ("both", 29))},
        "contrasts": [
            {"arm": arm, "against": "none", "differences": {"AP": gain}}
            for arm, gain in zip(("mgd", "both"), gains, strict=True)
        ],
    }
    content["statistics"]["stage"]["contrasts"].append({"arm": "pkd", "differences": {"AP": {}}})
    methods_table.RECORDS.write_text(json.dumps(content))
    rows = [line for line in methods_table.measured("mgd").splitlines() if "`" in line[:4]]
    assert rows == [
        "| `mgd` | 2 | 30.5 | 34.5 | +4.0 [-1.2, +9.2] | - |",
        "| `both` | 1 | 30.5 | 29.0 | -2.0 | - |",
    ]


def test_notes_hold_the_arms_on_retinanet_beside_their_own_plain_student(results) -> None:
    assert "RetinaNet" not in methods_table.notes()
    content = json.loads(methods_table.RECORDS.read_text())
    for arm, seed, ap in (
        ("none", 1, 10.0),
        ("none", 2, 11.0),
        ("bckd", 1, 13.0),
        ("bckd", 2, 12.0),
    ):
        arm = f"{arm}_retinanet"
        run = {"arm": arm, "seed": seed, "metrics": {"AP": ap}, "commit": "e"}
        content["runs"][f"retinanet/{arm}/{seed}"] = run
    methods_table.RECORDS.write_text(json.dumps(content))
    assert "student 10.5 AP; bckd 12.5 (+2.0; 2)." in methods_table.notes()


def test_results_that_are_not_there(results) -> None:
    for file in results.glob("*.json"):
        file.unlink()
    assert methods_table.costs() == methods_table.aps() == {}
    assert methods_table.notes() == ""


def test_collect_losses_of_the_first_seed(results) -> None:
    for seed in (1, 3):
        folder = results / "out" / "short" / "mgd" / "t1" / str(seed)
        folder.mkdir(parents=True)
        rows = [{"iteration": i, "loss_distill": seed * 10.0 - i / 100} for i in range(19, 240, 20)]
        lines = [*map(json.dumps, rows), json.dumps({"iteration": 239, "bbox/AP": 5.0})]
        (folder / "metrics.json").write_text("\n".join(lines))
    methods_table.collect_losses(results / "out")
    found = {"mgd": [[20, 9.81], [120, 8.81], [220, 7.81], [240, 7.61]]}
    assert methods_table.read(methods_table.LOSSES) == found
    # What other studies' folders gave is kept.
    methods_table.collect_losses(results / "none")
    assert methods_table.read(methods_table.LOSSES) == found
