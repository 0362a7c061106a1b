"""The demo: its own functions on stand-in trainings, and one whole run of seconds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from ssim_kd.__main__ import main
from ssim_kd.metrics_file import Series
from tests.documentation import ROOT
from tools import demo, demo_training

TEACHER, STUDENT, DISTILLED = demo.TRAININGS
RESULT = {"iteration": 3, "bbox/AP": 12.0, "bbox/AP50": 34.0, "bbox/AP75": 5.0}
# Stands in for train_net.py: says what it was called with, and leaves a result.
WORKS = f"""
import json, pathlib, sys
args = sys.argv[1:]
folder = pathlib.Path(args[args.index("OUTPUT_DIR") + 1])
with open(folder / "calls.txt", "a") as file:
    file.write(" ".join(args) + "\\n")
(folder / "metrics.json").write_text(json.dumps({RESULT!r}) + "\\n")
(folder / "model_final.pth").write_bytes(b"")
"""
FAILS = "import sys; print('line\\n' * 100 + 'the cause'); sys.exit(3)"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def arguments(out: Path, *more: str):
    data = str(out.parent / "data")
    return demo.parse(["--output", str(out), "--data", data, "--device", "cpu", "--quick", *more])


def train(training: demo.Training, out: Path, script: str, *more: str) -> None:
    args = arguments(out, *more)
    path = out.parent / "stand_in.py"
    path.write_text(script)
    job = job_of(training, args, out)
    console = demo_training.Console(terminal=False)
    demo_training.train([job], console, resume=args.resume, script=path)


def job_of(training: demo.Training, args, out: Path) -> demo_training.Job:
    cfg = demo.config_of(training, args, out)
    return demo_training.Job(training, cfg, demo.overrides(training, args, out), out / training.key)


def test_a_seed_below_zero_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.parse(["--seed", "-1"])
    assert "--seed is -1: expected 0 or more" in capsys.readouterr().err


def test_plain_and_distilled_differ_in_the_distillation_alone(out: Path) -> None:
    args = arguments(out)
    plain = demo.config_of(STUDENT, args, out).clone()
    distilled = demo.config_of(DISTILLED, args, out).clone()
    weights = out / "teacher" / "model_final.pth"
    assert Path(distilled.MODEL.DISTILL.TEACHER.WEIGHTS) == weights
    assert Path(distilled.MODEL.DISTILL.TEACHER.NAME).name == TEACHER.config
    for cfg in (plain, distilled):
        cfg.defrost()
        cfg.OUTPUT_DIR = ""
        cfg.MODEL.DISTILL = None
    assert plain == distilled


def test_a_training_leaves_its_result(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(TEACHER, out, WORKS)
    assert demo_training.results_of(out / "teacher") == {"AP": 12.0, "AP50": 34.0, "AP75": 5.0}
    assert "teacher: AP 12.0  AP50 34.0  AP75 5.0" in capsys.readouterr().out


def test_resume_keeps_what_is_finished(out: Path) -> None:
    train(TEACHER, out, WORKS)
    train(TEACHER, out, FAILS, "--resume")  # is not called


@pytest.mark.parametrize(
    ("flags", "finished", "resumed"),
    [((), True, [False]), (("--resume",), False, [False, True])]
    + [(("--resume", "--seed", "7"), True, [False])],
    ids=["starts anew", "goes on", "another seed"],
)
def test_a_second_call(out: Path, flags, finished: bool, resumed: list[bool]) -> None:
    train(TEACHER, out, WORKS)
    if not finished:
        (out / "teacher" / "model_final.pth").unlink()
    train(TEACHER, out, WORKS, *flags)
    calls = (out / "teacher" / "calls.txt").read_text().splitlines()
    assert ["--resume" in call for call in calls] == resumed
    assert ("SEED 7" in calls[-1]) == ("--seed" in flags)


def test_a_failing_training_shows_the_end_of_its_log(out: Path) -> None:
    with pytest.raises(demo_training.StepError, match="exit status 3") as found:
        train(STUDENT, out, FAILS)
    assert str(found.value).splitlines()[-1] == "the cause"
    assert len(str(found.value).splitlines()) < 30


def test_a_training_without_results_has_failed(out: Path) -> None:
    with pytest.raises(demo_training.StepError, match="exit status 0"):
        train(STUDENT, out, "pass")


def test_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    console = demo_training.Console(period=60, terminal=False)
    for number in range(5):
        console.progress(f"iteration {number}")
    assert capsys.readouterr().out == "  iteration 0\n"


def test_a_failing_training_ends_those_beside_it(out: Path) -> None:
    # The teacher fails, the student would run for a minute.
    script = f"import sys, time\nif 'teacher' in str(sys.argv): sys.exit(3)\ntime.sleep(60){WORKS}"
    path = out.parent / "stand_in.py"
    path.write_text(script)
    args = arguments(out)
    jobs = [job_of(training, args, out) for training in (TEACHER, STUDENT)]
    with pytest.raises(demo_training.StepError, match=r"teacher.*exit status 3"):
        demo_training.train(jobs, demo_training.Console(terminal=False), resume=False, script=path)
    assert not (out / "student" / "metrics.json").exists()


def test_progress_of_a_training(out: Path) -> None:
    job = job_of(TEACHER, arguments(out), out)
    assert demo_training.progress_of(job) == "teacher starts"
    job.folder.mkdir(parents=True)
    row = {"iteration": 1, "total_loss": 1.25, "eta_seconds": 83.0}
    (job.folder / "metrics.json").write_text(json.dumps(row) + '\n{"iteration": 3')
    assert demo_training.progress_of(job) == "teacher 2/4, loss 1.250, 1:23 left"
    (job.folder / "metrics.json").write_text(json.dumps({**row, "iteration": 3}))
    assert demo_training.progress_of(job) == "teacher is evaluated"


def test_seconds_trained_of_medians() -> None:
    assert demo.seconds_trained({"time": Series([19, 39], [0.5, 1.0])}) == 20 * 0.5 + 20 * 1.0


def test_images_per_second_of_each_model() -> None:
    speeds = demo.images_per_second(
        {"a": len, "b": lambda x: torch.ones(300, 300) @ x[0]}, [torch.ones(300, 300)] * 3
    )
    assert set(speeds) == {"a", "b"}
    assert speeds["a"] > speeds["b"] > 0


def test_the_table() -> None:
    row = {"AP": 1.0, "AP50": 2.0, "AP75": 3.0, "parameters": 235_000}
    row |= {"images_per_second": 40.0, "seconds_trained": 61.4}
    text = demo.table({"teacher": row, "student": row, "distilled": {**row, "AP": 2.5}})
    lines = text.splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[3].split() == ["distilled", "student", "2.5", "2.0", "3.0", "0.23M", "40.0", "61s"]
    assert lines[-3].startswith("Distillation changed the student's AP by +1.5, in one run")
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    ranges = re.findall(r"\d+ to \d+", " ".join(lines))
    assert len(ranges) == 2 and all(f"| {found} |" in page for found in ranges)


def test_bad_data_folder_is_told_and_the_status_is_not_zero(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out.parent / "data").write_text("a file where a folder should be")
    argv = ["--output", str(out), "--data", str(out.parent / "data"), "--device", "cpu", "--quick"]
    assert demo.main(argv) == 1
    assert "data" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_demo(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_here(
        jobs: list[demo_training.Job], _: demo_training.Console, *, resume: bool
    ) -> None:
        for job in jobs:  # in this process
            config = str(demo_training.CONFIGS / job.training.config)
            assert main(["train", "--config-file", config, *job.options]) == 0

    monkeypatch.setattr(demo, "train", train_here)
    argv = ["--output", str(out), "--data", str(out.parent / "data"), "--device", "cpu", "--quick"]
    assert demo.main(argv) == 0
    summary = json.loads((out / "summary.json").read_text())
    for key in ("teacher", "student", "distilled"):
        assert {"AP", "AP50", "AP75", "parameters"} <= summary[key].keys()
        assert summary[key]["images_per_second"] > 0
        assert summary[key]["seconds_trained"] > 0
    assert summary["student"]["parameters"] == summary["distilled"]["parameters"]
    with Image.open(out / "demo.png") as image:
        assert image.width > 800
    assert (out / "demo.png").stat().st_size < 600_000
    # The student's file is a plain detector's: nothing of the teacher is in it.
    keys = torch.load(out / "distilled" / "model_final.pth", weights_only=True)["model"]
    plain = torch.load(out / "student" / "model_final.pth", weights_only=True)["model"]
    assert keys.keys() == plain.keys()
