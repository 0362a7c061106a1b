"""ssim-kd compare on a stand-in for train_net.py."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssim_kd.__main__ import main
from ssim_kd.comparing import measuring, running
from ssim_kd.comparing.records import Records
from ssim_kd.comparing.study import Study, read_study

REAL_EXECUTOR = running.build_executor

# AP is 40, plus the seed, plus 5 with a teacher, less what the weight is off 3.
STAND_IN = """
import json, math, os, pathlib, sys
args = sys.argv[1:]
opts = dict(zip(args[3::2], args[4::2]))
assert args[0] == "--config-file" and args[2] == "--resume"
folder = pathlib.Path(opts["OUTPUT_DIR"])
data = pathlib.Path(os.environ["STAND_IN_DATA"])
with open(data / "calls.txt", "a") as file:
    file.write(str(folder) + "\\n")
if (data / "broken").exists() and opts["SEED"] == "2":
    sys.exit("the cause")
teacher = opts.get("MODEL.DISTILL.TEACHER.WEIGHTS")
for needed in (teacher, opts.get("MODEL.WEIGHTS")):
    assert needed is None or pathlib.Path(needed).is_file()
ap = 40 + int(opts["SEED"])
if teacher:
    ap += 5 - abs(math.log10(float(opts["MODEL.DISTILL.LOSS_WEIGHT"]) / 3))
row = {"bbox/AP": ap, "bbox/AP50": ap, "bbox/AP75": ap}
rows = [{"iteration": 1, **row, "bbox/AP": ap - 0.5}, {"iteration": 3, **row}]
(folder / "metrics.json").write_text("\\n".join(map(json.dumps, rows)))
(folder / "model_final.pth").write_text(str(ap))
(folder / "config.yaml").write_text(
    "DATASETS: {TEST: [own], REGISTER_COCO: [[own, truth.json, x]]}"
)
(folder / "inference").mkdir(exist_ok=True)
found = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "score": 0.9}]
(folder / "inference" / "coco_instances_results.json").write_text(json.dumps(found))
"""
# A box of 100 pixels, which is found, and one of 900, which is not.
TRUTH = {
    "info": {},
    "images": [{"id": 1, "width": 64, "height": 64}],
    "categories": [{"id": 1, "name": "a"}],
    "annotations": [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": 1, "iscrowd": 0}
        for i, box in enumerate([[0, 0, 10, 10], [30, 30, 30, 30]], start=1)
    ],
}
STUDY: dict[str, Any] = {
    "small_box": 400,
    "models": {
        "start": {"config": "student.yaml", "seed": 7, "script": "train.py"},
        "t1": {"config": "teacher.yaml", "seed": 1, "script": "train.py"},
        "t2": {"config": "teacher.yaml", "seed": 2, "script": "train.py"},
    },
    "students": {"config": "student.yaml", "start": "start", "script": "train.py"},
    "arms": {
        "none": {"opts": {"MODEL.DISTILL.ENABLED": False}},
        "ssim": {"weight": "tuned"},
        "ssim_30": {"weight": 30},
    },
    "tuning": {"teacher": "t1", "values": [0.3, 3, 30], "refine": 1, "seeds": [101, 102]},
    "stages": {
        "main": {
            "arms": ["none", "ssim", "ssim_30"],
            "design": {"unit": "student", "students": {"t2": [1, 3]}},
            "gates": "none",
            "contrasts": [["ssim", "none"], ["ssim", "ssim_30"]],
            "primary": [["ssim", "none"], ["ssim", "ssim_30"]],
        }
    },
}


class Inline:
    """An executor without processes, each of which would import torch."""

    def batch(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args))
        except RuntimeError as error:
            future.set_exception(error)
        return future


class Bench:
    """A study in a separate folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "studies" / "own.yaml"
        self.records = root / "own.json"
        self.path.parent.mkdir()
        self.script = self.path.parent / "train.py"
        self.script.write_text(STAND_IN)
        # Trainings name their data from the working directory.
        (root / "truth.json").write_text(json.dumps(TRUTH))
        for name in ("student", "teacher"):
            (self.path.parent / f"{name}.yaml").write_text("SOLVER: {MAX_ITER: 3}")
        self.write(STUDY)

    def write(self, content: dict[str, Any]) -> None:
        self.path.write_text(yaml.safe_dump(content))

    def run(self, *more: str) -> int:
        folders = ["--output", str(self.root / "output")]
        records = ["--records", str(self.records), "--docs", str(self.root / "own.md")]
        more = (*records, "--workers", "3", *more)
        return main(["compare", str(self.path), *folders, *more])

    def calls(self) -> list[str]:
        """The folders of the trainings since the last call."""
        path = self.root / "calls.txt"
        lines = path.read_text().splitlines() if path.is_file() else []
        path.unlink(missing_ok=True)
        return sorted(str(Path(line).relative_to(self.root / "output")) for line in lines)

    @property
    def study(self) -> Study:
        return read_study(self.path)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("STAND_IN_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "build_executor", lambda *args: Inline())
    monkeypatch.setattr(measuring, "weights_hash", lambda path: path.read_text())
    return Bench(tmp_path)


def test_a_study_is_run_tuned_resumed_and_reported(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    (bench.root / "broken").touch()  # t2 has the seed 2
    assert bench.run() == 1
    (bench.root / "broken").unlink()
    assert "the cause" in capsys.readouterr().err
    assert {"models/start", "models/t1", "tuning/ssim/3/t1/101"} <= set(bench.calls())
    assert "students/ssim/t1/2" not in Records(bench.records).runs
    (bench.root / "calls.txt").unlink(missing_ok=True)

    assert bench.run() == 0
    resumed = bench.calls()
    assert "models/t2" in resumed and "models/t1" not in resumed
    records = Records(bench.records)
    # 3 models; 4 weights x 2 seeds; 2 seeds of none and of ssim_30 and of ssim.
    assert len(records.runs) == 3 + 8 + 6
    assert records.tuned["ssim"] == pytest.approx(3, rel=0.5)
    record = records.runs["students/ssim_30/t2/1"]
    assert record["metrics"] == {
        "AP": 45.0, "AP50": 45.0, "AP75": 45.0, "small": 100.0, "large": 0.0
    }  # fmt: skip
    assert record["curve"] == [[1, 44.5], [3, 45.0]]
    assert record["teacher_sha256"] == records.runs["models/t2"]["weights_sha256"]
    assert {"cpu_seconds", "peak_memory_mb", "seconds", "commit", "opts"} <= record.keys()
    found = records.statistics["main"]["contrasts"][1]
    assert found["slots"] == [["t2", 1], ["t2", 3]]
    assert found["differences"]["AP"]["p"] == 0.5
    page = (bench.root / "own.md").read_text()
    assert "| ssim − none | 2 | +5.0" in page
    assert (bench.root / "assets" / "own_main.png").is_file()

    # The records are enough: a machine that has lost the folders trains nothing again.
    before = bench.records.read_text()
    (bench.root / "output").rename(bench.root / "lost")
    assert bench.run() == 0
    assert bench.calls() == []
    assert bench.records.read_text() == before

    # More seeds: their models are made anew, and nothing else.
    design = {"unit": "teacher", "students": {"t1": [4, 3], "t2": [1, 3]}}
    more = {**STUDY["stages"]["main"], "design": design, "arms": ["none", "ssim_30"]}
    bench.write({**STUDY, "stages": {"main": more}})
    assert bench.run() == 0
    assert bench.calls() == [
        "models/start", "models/t1", "students/none/4",
        "students/ssim_30/t1/3", "students/ssim_30/t1/4",
    ]  # fmt: skip
    # Two teachers of two students each, which share the plain students of their seeds.
    arms = Records(bench.records).statistics["main"]["arms"]
    assert (arms["none"]["AP"]["n"], arms["ssim_30"]["AP"]["n"]) == (3, 2)
    assert arms["ssim_30"]["AP"]["mean"] == pytest.approx((3.5 + 2) / 2 + 44)
    assert "| ssim_30 | 30 | 2 | 4 |" in (bench.root / "own.md").read_text()


def test_trainings_go_through_submitit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "build_executor", REAL_EXECUTOR)
    script = (
        STAND_IN.replace("write_text(str(ap))", "touch()")
        + """
import torch
torch.save({"model": {"x": torch.tensor([float(ap)])}}, folder / "model_final.pth")
"""
    )
    bench.script.write_text(script)
    stage = {"arms": ["none"], "design": {"unit": "student", "students": {"": [1]}}, "title": "One"}
    students = {"config": "student.yaml", "script": "train.py"}
    bench.write({**STUDY, "students": students, "stages": {"one": stage}})
    assert bench.run() == 0
    record = Records(bench.records).runs["students/none/1"]
    assert record["metrics"]["AP"] == 41.0
    assert list((bench.root / "output" / "jobs").glob("*_log.out"))


def test_a_run_is_known_by_all_that_it_asks_for(bench: Bench) -> None:
    def fingerprints() -> list[str]:
        arms = bench.study.stage("main", {"ssim": 3.0})
        return [run.fingerprint for by_slot in arms.values() for run in by_slot.values()]

    first = fingerprints()
    assert len(set(first)) == 6
    assert fingerprints() == first
    changed = {**STUDY, "models": {**STUDY["models"], "t2": {"config": "teacher.yaml", "seed": 5}}}
    bench.write(changed)
    # Both seeds of none, of ssim and of ssim_30.
    same = [a == b for a, b in zip(first, fingerprints(), strict=True)]
    assert same == [True, True, *[False] * 4]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stages": {"main": {**STUDY["stages"]["main"], "arms": ["l9"]}}}, "stages.main.arms"),
        ({"arms": None}, "arms is missing"),
        ({"tuning": None}, "arms.ssim has the weight tuned"),
        ({"arms": {**STUDY["arms"], "none": {"wieght": 4}}}, "arms.none has .*wieght"),
        ({"arms": {**STUDY["arms"], "ssim_30": {"weight": "Auto"}}}, "arms.ssim_30.weight.*Auto"),
        *(
            (
                {"stages": {"main": {**STUDY["stages"]["main"], key.split(".")[0]: named}}},
                f"stages.main.{key}",
            )
            for key, named in {
                "contrasts": [["ssim", "nnoe"]],
                "primary": [["simm", "none"]],
                "identical": [["ssim", "l9"]],
                "gates": "nnoe",
                "design": [1, 2],
                "design.*t2": {"unit": "teacher", "students": {"t2": 3}},
                "design.unit": {"unit": "seed", "students": {"t1": [1]}},
                "design.students": {"unit": "teacher", "students": {"t9": [1]}},
            }.items()
        ),
    ],
)
def test_a_study_that_is_wrong_is_refused(
    bench: Bench, change: dict[str, Any], message: str
) -> None:
    content = {**STUDY, **change}
    bench.write({key: value for key, value in content.items() if value is not None})
    with pytest.raises(ValueError, match=message):
        read_study(bench.path)
    assert bench.run("--report") == 2


@pytest.mark.parametrize(
    "flag, wrong, known",
    [
        *[
            ("--stages", "plain_", "main"),
            ("--arms", "plain_", "ssim"),
            ("--seeds", "77", "[1, 3]"),
        ],
        *[("--opts", "SEED", "KEY VALUE"), ("--submitit", "gpu", "NAME=VALUE")],
    ],
)
def test_main_names_what_the_study_has(
    bench: Bench, flag: str, wrong: str, known: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.run(flag, wrong) == 2
    message = capsys.readouterr().err
    assert flag in message and wrong in message and known in message


def test_main_names_an_arm_that_no_stage_trains(bench: Bench, capsys) -> None:
    bench.write({**STUDY, "arms": {**STUDY["arms"], "unused": {"weight": 1}}})
    assert bench.run("--arms", "unused") == 2
    message = capsys.readouterr().err
    assert "--arms" in message and "unused" in message and "'ssim'" in message


def test_a_model_that_is_not_there_is_refused(bench: Bench) -> None:
    bench.write({**STUDY, "students": {**STUDY["students"], "start": "elsewhere"}})
    with pytest.raises(ValueError, match="start of students/none/1 is 'elsewhere'"):
        bench.study.stage("main", {})


def test_weights_hash_is_that_of_the_student(tmp_path: Path) -> None:
    def hash_of(value: float, iteration: int) -> str:
        path = tmp_path / "model_final.pth"
        torch.save({"model": {"x": torch.tensor([value])}, "iteration": iteration}, path)
        return measuring.weights_hash(path)

    assert hash_of(1.0, 2) == hash_of(1.0, 3) != hash_of(1.5, 2)
    torch.save({"model": Path()}, tmp_path / "model_final.pth")
    with pytest.raises(ValueError, match="not a checkpoint"):  # of a folder that was received
        measuring.weights_hash(tmp_path / "model_final.pth")


def test_a_student_that_detects_nothing_has_an_ap_of_zero(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(1)}}, tmp_path / "model_final.pth")
    row = {"iteration": 9, **{f"bbox/{name}": float("nan") for name in ("AP", "AP50", "AP75")}}
    (tmp_path / "config.yaml").write_text("DATASETS: {TEST: [own]}")
    (tmp_path / "metrics.json").write_text(json.dumps(row) + "\n")
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference" / "coco_instances_results.json").write_text("[]")
    request = {"small_box": 400, "teacher_sha256": "", "cwd": str(tmp_path)}
    found = measuring.measure(tmp_path, request, {})["measured"]
    assert found["metrics"] == dict.fromkeys(("AP", "AP50", "AP75", "small", "large"), 0.0)
    assert found["curve"] == [[9, 0.0]]
