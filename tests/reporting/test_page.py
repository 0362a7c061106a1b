"""The page: what it shows of runs that are known, whole or damaged."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from ssim_kd.__main__ import main
from ssim_kd.metrics_file import Series
from ssim_kd.reporting import write_report
from ssim_kd.reporting.charts import MOST_POINTS, Line, curves, thin
from ssim_kd.reporting.detections import NotAvailableError, find_test_set
from ssim_kd.reporting.relatives import find_control, find_start, find_teacher, teacher_iteration
from ssim_kd.reporting.runs import read_run
from ssim_kd.run_file import write_run_file
from tests.reporting.made import FOUND, box, config, rows, write_pair, write_run, write_set


class Page(HTMLParser):
    """Text by section, the rows of tables, elements that are still open."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.sections: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self._section = ""
        self.feed(self.html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in ("meta", "link", "img", "br", "wbr"):
            self.open.append(tag)
        names = dict(attrs)
        if tag == "section":
            self._section = names["id"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.sections[self._section] = self.sections.get(self._section, "") + data
        if self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.strip()

    def row(self, name: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == name)


def page_of(*runs: Path, **named: Path) -> Page:
    path = runs[0] / "report.html"
    write_report(runs, path, **named)
    page = Page(path)
    assert page.open == []
    assert all(a.startswith(("#", "data:image/")) for a in page.addresses)
    assert len(page.html) < 3_000_000
    ids = re.findall(r'\bid="([^"]*)"', page.html)
    assert len(ids) == len(set(ids))
    used = {a[1:] for a in page.addresses if a.startswith("#")}
    used |= set(re.findall(r"url\(#([^)]+)\)", page.html))
    assert used <= set(ids)
    return page


def test_write_report_next_to_control_and_teacher(tmp_path: Path) -> None:
    run, _, _ = write_pair(tmp_path)
    page = page_of(run)
    result = page.sections["result"]
    assert "+10.0" in result and "20.0" in result
    assert "25% of the gap" in result  # (30 - 20) / (60 - 20)
    assert page.row("ssim")[1:6] == ["30.0", "+10.0", "29.5", "30.0", "30.0"]
    assert page.row("ssim")[8:] == ["30.0 at 60", "0.200", "40.0", "1200 MiB", "distilled"]
    assert page.row("plain")[1:3] == ["20.0", "–"] and page.row("plain")[-1] == "control"
    assert page.row("teacher")[1:3] == ["60.0", "–"] and page.row("teacher")[-1] == "teacher"
    assert page.row("b") == ["b", "31.0", "21.0", "61.0", "+10.0"]
    assert page.row("background") == ["background", "2", "2", "2"]
    config = page.row("MODEL.META_ARCHITECTURE")
    assert config == [
        "MODEL.META_ARCHITECTURE",
        "DistilledDetector",
        "RetinaNet",
        "GeneralizedRCNN",
    ]
    assert "NVIDIA H100" in page.sections["environment"] and "1234567890+" in page.html
    # Student and control in each chart of a loss; levels only of the student.
    labels = re.findall(r'aria-label="([^"]*)"', page.html)
    assert "total_loss: ssim, plain" in labels and "distill/ssim_p3: ssim" in labels
    assert "AP by iteration: ssim, plain, teacher" in labels
    assert not any("_weighted" in label or "rank" in label for label in labels)
    assert page.html.count("ssim: p2 14.8, p3 6.0.") == 1 and "plain: p2" not in page.html
    pictures = page.sections["pictures"]
    assert "1.png" in pictures and "3.png" in pictures and "2.png" not in pictures
    # Image 1, at a score of 0.5: two right; one duplicate, one of another class, ...
    assert (
        "2 correct, 1 both, 1 classification, 1 duplicate, 1 localisation, 2 not found" in pictures
    )


def test_write_report_of_several_runs(tmp_path: Path) -> None:
    run, control, teacher = write_pair(tmp_path)
    cfg = config(write_set(tmp_path / "data"), teacher=str(teacher), SOLVER__BASE_LR=0.01)
    page = page_of(run, write_run(tmp_path / "slow", cfg, rows(ap=40.0)), control=control)
    assert "2 trainings side by side" in page.html
    assert page.row("ssim")[2] == "+10.0" and page.row("slow")[2] == "+20.0"
    assert "AP by iteration: ssim, slow, plain, teacher" in page.html
    assert page.row("SOLVER.BASE_LR")[1:] == ["0.02", "0.01", "0.02", "0.001"]


def test_write_report_finds_teacher_and_control_among_the_runs(tmp_path: Path) -> None:
    run, control, teacher = write_pair(tmp_path)
    # Another that could be the control, but is not on the page.
    write_run(tmp_path / "again", config(write_set(tmp_path / "data")), rows())
    page = page_of(teacher, run, control)
    roles = [(row[0], row[2], row[-1]) for row in page.rows[1:4]]
    assert roles == [
        ("ssim", "+10.0", "distilled"),
        ("plain", "–", "control"),
        ("teacher", "–", "teacher"),
    ]
    assert "25% of the gap" in page.sections["result"] and "Control" not in page.sections["ap"]


def test_write_report_of_runs_with_one_teacher_and_with_several(tmp_path: Path) -> None:
    run, control, teacher = write_pair(tmp_path)
    page = page_of(control, run)
    assert page.row("teacher")[-1] == "teacher" and page.row("plain")[-1] == "control"
    other = write_run(tmp_path / "other", config(write_set(tmp_path / "data")), rows())
    cfg = config(write_set(tmp_path / "data"), teacher=str(other))
    page = page_of(run, write_run(tmp_path / "second", cfg, rows(distils=True)))
    notes = page.sections["ap"]
    assert "Teacher: not available: there are several" in notes and "--teacher" in notes
    assert str(teacher) in notes and str(other) in notes


@pytest.mark.parametrize(("weight", "shown"), [(4.0, "4"), ("auto", "auto")])
def test_write_report_of_a_feature_loss_that_detects_nothing(weight, shown, tmp_path) -> None:
    keys = {"MODEL__DISTILL__NAME": "FeatureDistiller", "MODEL__DISTILL__LOSS": "ssim"}
    keys["MODEL__DISTILL__LOSS_WEIGHT"] = weight
    cfg = config(write_set(tmp_path / "data"), teacher="t", **keys)
    run = write_run(tmp_path / "distilled", cfg, rows(ap=0.0), found=[{**FOUND[0], "score": 0.1}])
    page = page_of(run)
    assert (
        f"distilled: SSIM, weight {shown} ·" in page.html and "FeatureDistiller ·" not in page.html
    )
    assert "<small>distilled</small>" not in page.html
    assert "no detection at 0.5 or more" in page.sections["pictures"]
    assert "MODEL.<wbr>META_<wbr>ARCHITECTURE" in page.html
    labels = page.html.split('aria-label="AP by iteration')[1].split("</svg>")[0]
    assert ">0</text>" in labels and "\u2212" not in labels


def test_write_report_of_a_plain_run(tmp_path: Path) -> None:
    entry = write_set(tmp_path / "data")
    page = page_of(write_run(tmp_path / "run", config(entry), rows()))
    assert "Teacher" not in page.html and "without distillation" in page.html


def test_write_report_of_a_run_alone(tmp_path: Path) -> None:
    entry = write_set(tmp_path / "data")
    page = page_of(
        write_run(tmp_path / "run", config(entry, teacher="output/t"), rows(distils=True))
    )
    notes = page.sections["ap"]
    assert "Teacher: not available: no metrics.json next to output/t" in notes
    assert "--teacher" in notes and "--control" in notes
    assert "AP of the start weights: not available" in notes


@pytest.mark.parametrize("part", ["config", "metrics", "detections", "truth", "image", "facts"])
def test_write_report_with_a_missing_part(tmp_path: Path, part: str) -> None:
    run, control, _ = write_pair(tmp_path)
    files = {"config": "config.yaml", "metrics": "metrics.json", "facts": "run.json"}
    files["detections"] = "inference/coco_instances_results.json"
    data = {"truth": "truth.json", "image": "1.png"}
    (tmp_path / "data" / data[part] if part in data else run / files[part]).unlink()
    page = page_of(run, control=control)
    missing = data.get(part) or Path(files[part]).name
    assert re.search(rf"not available: [^.]*{re.escape(missing)}", page.html)


def test_write_report_with_damaged_detections(tmp_path: Path) -> None:
    run, control, _ = write_pair(tmp_path)
    (run / "inference" / "coco_instances_results.json").write_text('[{"image_id": 1')
    other = [{**d, "image_id": 99} for d in FOUND]
    (control / "inference" / "coco_instances_results.json").write_text(json.dumps(other))
    page = page_of(run)
    errors = page.sections["errors"]
    assert "Errors of ssim: not available" in errors and "not readable" in errors
    assert "Errors of plain: not available" in errors and "another set" in errors


def test_write_report_without_evaluation(tmp_path: Path) -> None:
    entry = write_set(tmp_path / "data")
    metrics = [row for row in rows() if "bbox/AP" not in row]
    page = page_of(write_run(tmp_path / "run", config(entry), metrics, found=None))
    assert "AP of run: not available: no evaluation" in page.sections["ap"]
    # With detections, as --eval-only leaves them, AP is computed.
    page = page_of(write_run(tmp_path / "evaluated", config(entry), metrics))
    assert "computed by pycocotools" in page.sections["ap"]
    assert page.row("evaluated")[3] == "29.5"  # AP50 of test_errors.py: 29.455


def test_write_report_with_detections_of_another_evaluation(tmp_path: Path) -> None:
    entry = write_set(tmp_path / "data")
    page = page_of(write_run(tmp_path / "run", config(entry), rows(), found=FOUND[:1]))
    assert "are not those of the AP above" in page.sections["errors"]


def test_write_report_escapes_names(tmp_path: Path) -> None:
    names = ("<script>alert(1)</script>", "a & b $x_1$ \u6f22")
    entry = write_set(tmp_path / "data", names=names)
    folder = tmp_path / "<b>run&</b>"
    page = page_of(write_run(folder, config(entry, NOTE="<i>\ud7ff</i>"), rows(names=names)))
    assert "<script" not in page.html and "<b>run" not in page.html and "<i>" not in page.html
    assert names[0] in [row[0] for row in page.rows if row]


def test_write_report_of_80_classes(tmp_path: Path) -> None:
    names = tuple(f"class {i}" for i in range(80))
    entry = write_set(tmp_path / "data", names=names)
    page = page_of(write_run(tmp_path / "run", config(entry), rows(ap=10.0, names=names)))
    table = [row[0] for row in page.rows if row and row[0].startswith("class ")]
    assert table == sorted(names, key=lambda n: -int(n.split()[1]))  # 80 of them, highest first
    assert "The 12 classes of 80 with the highest and the lowest AP" in page.sections["ap"]


def test_write_report_of_a_long_run_that_diverged(tmp_path: Path) -> None:
    entry = write_set(tmp_path / "data")
    metrics = [
        {"iteration": i, "total_loss": 1.0 + i % 7 if i < 80_000 else float("nan")}
        | {f"loss_{k}": 0.5 for k in range(8)}
        for i in range(19, 90_000, 20)
    ]
    page = page_of(write_run(tmp_path / "run", config(entry), metrics))
    assert "total_loss of run: 500 values are not finite" in page.sections["losses"]
    assert len(page.html) < 400_000


def test_write_report_of_a_lazy_config(tmp_path: Path) -> None:
    cfg = {"model": {"_target_": "x.RetinaNet"}, "train": {"max_iter": 60, "device": "cpu"}}
    cfg["dataloader"] = {"test": {"dataset": {"names": "coco_2017_val"}}}
    cfg["model"]["num_classes"], cfg["model"]["head"] = 3, {"num_classes": "${..num_classes}"}
    control = write_run(tmp_path / "plain", yaml.safe_dump(cfg), rows(ap=20.0))
    student = {**cfg["model"], "head": {"num_classes": 3}}
    cfg["model"] = {"_target_": "x.DistilledDetector", "student": student, "max_iter": 60}
    cfg["model"]["teacher"] = {"name": "teacher"}
    run = write_run(tmp_path / "run", yaml.safe_dump(cfg), rows())
    page = page_of(run)
    assert page.row("run")[1] == "29.5" and "LazyConfig" in page.sections["config"]
    assert "60 iterations" in page.html and find_control(read_run(run)).folder == control.resolve()
    # Where its sets are is in run.json.
    write_run_file(str(run), {"test_sets": {"coco_2017_val": ["val.json", "val"]}})
    assert find_test_set(read_run(run), "coco_2017_val").json_file == "val.json"
    cfg["train"]["max_iter"] = 70
    (run / "config.yaml").write_text(yaml.safe_dump(cfg))
    with pytest.raises(NotAvailableError, match="no run"):
        find_control(read_run(run))


def test_write_report_with_several_test_sets(tmp_path: Path) -> None:
    entry = write_set(tmp_path / "data")
    cfg = config(entry, DATASETS__TEST=["other", "made_val"])
    metrics = [{"iteration": 9, "other/bbox/AP": 11.0, "made_val/bbox/AP": 12.0}]
    page = page_of(write_run(tmp_path / "run", cfg, metrics))
    # The last one, whose detections the folder holds.
    assert page.row("run")[1] == "12.0" and "on made_val" in page.sections["result"]
    assert ["run", "other", "bbox", "11.0", "–", "–", "–", "–", "–"] in page.rows
    assert page.row("AP50") == ["AP50", "29.5"]


def test_find_control_where_it_is_not_certain(tmp_path: Path) -> None:
    run, control, _ = write_pair(tmp_path)
    assert find_control(read_run(run)).folder == control.resolve()
    with pytest.raises(NotAvailableError, match="plain"):
        find_control(read_run(control))
    entry = json.loads(json.dumps(yaml.safe_load((control / "config.yaml").read_text())))
    write_run(tmp_path / "again", entry, rows())
    with pytest.raises(NotAvailableError, match="several") as caught:
        find_control(read_run(run))
    assert "again" in str(caught.value) and "--control" in str(caught.value)


def test_write_report_names_what_a_control_differs_in(tmp_path: Path) -> None:
    run, control, _ = write_pair(tmp_path)
    assert "is not the control" not in page_of(run, control=control).sections["result"]
    cfg = yaml.safe_load((control / "config.yaml").read_text())
    cfg["SOLVER"] |= {"MAX_ITER": 30, "IMS_PER_BATCH": 4}
    (control / "config.yaml").write_text(yaml.safe_dump(cfg))
    said = page_of(run, control=control).sections["result"]
    assert "SOLVER.MAX_ITER (30, not 60)" in said and "SOLVER.IMS_PER_BATCH (4, not 8)" in said


def test_find_control_of_another_name_for_the_trackers(tmp_path: Path) -> None:
    run, control, _ = write_pair(tmp_path)
    cfg = yaml.safe_load((control / "config.yaml").read_text())
    cfg["TRACKING"] = {"RUN_NAME": "plain"}
    (control / "config.yaml").write_text(yaml.safe_dump(cfg))
    assert find_control(read_run(run)).folder == control.resolve()


@pytest.mark.parametrize("key", ["SEED", "SOLVER.BASE_LR", "MODEL.WEIGHTS"])
def test_find_control_of_another_recipe(tmp_path: Path, key: str) -> None:
    run, control, _ = write_pair(tmp_path)
    cfg = yaml.safe_load((control / "config.yaml").read_text())
    *parents, leaf = key.split(".")
    node = cfg
    for part in parents:
        node = node[part]
    node[leaf] = "other"
    (control / "config.yaml").write_text(yaml.safe_dump(cfg))
    with pytest.raises(NotAvailableError, match="no run"):
        find_control(read_run(run))


@pytest.mark.parametrize(
    ("weights", "iteration"),
    [("model_final.pth", None), ("", None), ("model_best.pth", 60), ("model_0000029.pth", 29)],
)
def test_teacher_iteration(tmp_path: Path, weights: str, iteration: int | None) -> None:
    run, _, teacher = write_pair(tmp_path)
    found = read_run(run)
    found.config["MODEL.DISTILL.TEACHER.WEIGHTS"] = weights and str(teacher / weights)
    assert teacher_iteration(found, read_run(teacher)) == iteration


def test_teacher_iteration_of_a_checkpoint_that_was_not_evaluated(tmp_path: Path) -> None:
    run, _, teacher = write_pair(tmp_path)
    cfg = yaml.safe_load((run / "config.yaml").read_text())
    cfg["MODEL"]["DISTILL"]["TEACHER"]["WEIGHTS"] = str(teacher / "model_0000039.pth")
    (run / "config.yaml").write_text(yaml.safe_dump(cfg))
    (teacher / "model_0000039.pth").touch()
    page = page_of(run)
    assert page.row("teacher")[1] == "–"
    assert "model_0000039.pth was not evaluated" in page.sections["ap"]


def test_write_report_of_a_teacher_on_another_set(tmp_path: Path) -> None:
    run, _, teacher = write_pair(tmp_path)
    other = write_set(tmp_path / "other")
    (teacher / "config.yaml").write_text(yaml.safe_dump(config(other)))
    page = page_of(run)
    assert page.row("teacher")[1] == "–" and "another file named made_val" in page.sections["ap"]


def test_write_report_of_a_teacher_that_was_evaluated(tmp_path: Path) -> None:
    run, _, _ = write_pair(tmp_path)
    found = run / "teacher" / "inference" / "coco_instances_results.json"
    found.parent.mkdir(parents=True)
    found.write_text(json.dumps([{**box(1, 1, 0, 0, 10, 10), "score": 1.0}]))
    page = page_of(run)
    # a: one of two boxes, at every threshold: 51 of 101 points; b: none.
    assert page.row("teacher")[1] == "25.2"


def test_find_teacher_by_its_weights(tmp_path: Path) -> None:
    run, _, teacher = write_pair(tmp_path)
    found = read_run(run)
    found.config["MODEL.DISTILL.TEACHER.NAME"] = "COCO-Detection/retinanet_R_101_FPN_3x.yaml"
    found.config["MODEL.DISTILL.TEACHER.WEIGHTS"] = str(teacher / "model_final.pth")
    assert find_teacher(found).folder == teacher


def test_find_start(tmp_path: Path) -> None:
    run, _, teacher = write_pair(tmp_path)
    found = read_run(run)
    with pytest.raises(NotAvailableError):
        find_start(found)
    found.config["MODEL.WEIGHTS"] = str(teacher / "model_final.pth")
    assert find_start(found).folder == teacher


def test_thin_keeps_the_course() -> None:
    long = Series(list(range(10_000)), [float(i) for i in range(10_000)])
    long.values[5000] = float("nan")
    short = thin(long)
    assert len(short.values) == MOST_POINTS and len(short.iterations) == MOST_POINTS
    assert all(abs(i - v) < 40 for i, v in zip(short.iterations, short.values, strict=True))
    assert thin(short) is short


def test_curves_have_variables_for_colours() -> None:
    svg = curves("c", "loss", [Line("x", 1, Series([0, 1, 2], [1.0, float("inf"), 3.0]))])
    assert "var(--run-1)" in svg and "var(--muted)" in svg and "var(--bad)" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg)


def test_main_of_tool(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, control, teacher = write_pair(tmp_path)
    output = tmp_path / "all.html"
    options = ["--teacher", str(teacher), "--control", str(control), "--output", str(output)]
    assert main(["report", str(run), *options]) == 0
    assert str(output) in capsys.readouterr().out and "25% of the gap" in output.read_text()
    assert main(["report", str(tmp_path / "data")]) == 1
    error = capsys.readouterr().err
    assert "RUN" in error and str(tmp_path / "data") in error and "OUTPUT_DIR" in error
    assert not list(tmp_path.rglob("*.unfinished"))
