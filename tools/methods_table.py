#!/usr/bin/env python
"""Writes the table of the methods in projects/README.md, and the figures in each one's README.

    tools/methods_table.py                                    # writes them
    tools/methods_table.py --losses studies/output/methods    # first takes the losses of runs

What a project says of itself is ``SUMMARY`` in its ``__init__.py``. Parameters are counted on the
shipped configs. Costs are those of projects/results/step.json, written by

    tools/benchmark_step.py --arms pkd cwd mgd ... --output projects/results/step.json

and AP those of studies/results/methods.json, written by ``ssim-kd compare studies/methods.yaml``.
"""

import argparse
import functools
import importlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ssim_kd.config import student_config  # noqa: E402
from ssim_kd.engine import load_config  # noqa: E402
from ssim_kd.metrics_file import METRICS_FILE, Series, read_metrics  # noqa: E402
from ssim_kd.modeling import FrozenTeacher, build_distillers  # noqa: E402
from ssim_kd.modeling.distillers import bind_distillers  # noqa: E402
from ssim_kd.projects import add_project_configs, project_names  # noqa: E402

PROJECTS = ROOT / "projects"
README = PROJECTS / "README.md"
STEP = PROJECTS / "results" / "step.json"
LOSSES = PROJECTS / "results" / "losses.json"
RECORDS = ROOT / "studies" / "results" / "methods.json"

BEGIN, END = "<!-- methods: tools/methods_table.py -->", "<!-- end of methods -->"
KEYS = ("method", "paper", "levels", "needs")
AP = "AP on digits (gain; seeds)"
MEASURED, END_MEASURED = "<!-- measured: tools/methods_table.py -->", "<!-- end of measured -->"
#: Arms that were trained when modules of their methods began with other weights.
OLD_STARTS = {"fbkd", "icd", "reviewkd", "reviewkd_dkd"}
#: Ends the name of an arm whose student is a RetinaNet.
DENSE = "_retinanet"
COLUMNS = (
    *("method", "paper", "levels or heads", "needs", "parameters", "step / l2"),
    *(AP, "its loss"),
)


def folders() -> dict[str, Path]:
    """The folder of each project, by the name of its package."""
    modules = {
        name: importlib.import_module(f"ssim_kd.projects.{name}") for name in project_names()
    }
    return {k: Path(str(module.__file__)).resolve().parents[1] for k, module in modules.items()}


def summary(name: str) -> dict[str, str]:
    """What a project says of itself.

    Raises:
        ValueError: it has no ``SUMMARY``, or one without a key.
    """
    module = importlib.import_module(f"ssim_kd.projects.{name}")
    found: dict[str, str] = getattr(module, "SUMMARY", {})
    missing = [key for key in KEYS if key not in found]
    if missing:
        raise ValueError(
            f"ssim_kd.projects.{name}: SUMMARY lacks {missing}; expected a dict of {list(KEYS)}."
        )
    return found


def config_of(name: str, folder: Path) -> Path:
    """The shipped config whose parameters are counted: Faster R-CNN on COCO, or else another."""
    configs = sorted((folder / "configs").glob(f"{name}_*_FPN_1x.yaml"))
    if not configs:
        raise ValueError(f"{folder}/configs has no {name}_*_FPN_1x.yaml.")
    return min(configs, key=lambda file: ("faster_rcnn_R_50" not in file.name, file.name))


def parameters(config: Path) -> int:
    """Number of trained parameters next to the student's, between two R-50 of 256 channels."""
    args = argparse.Namespace(config_file=str(config), opts=["MODEL.DEVICE", "meta"])
    cfg = load_config(args, add_project_configs)
    student = detector(student_config(cfg).dump())
    with torch.device("meta"):
        distillers = build_distillers(cfg)
        bind_distillers(distillers, student, FrozenTeacher(student))
    found = [p for distiller in distillers for p in distiller.parameters() if p.requires_grad]
    return sum(p.numel() for p in found)


@functools.cache
def detector(config: str) -> Any:
    """A detector without memory: its shapes are all that is asked for."""
    with torch.device("meta"):
        return build_model(CfgNode.load_cfg(config))


def read(path: Path) -> dict[str, Any]:
    """The content of a JSON file; {} if there is none."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def costs() -> dict[str, float]:
    """Seconds of a step over those with l2, by method; from the first pair that has it."""
    found: dict[str, float] = {}
    for pair in read(STEP).get("pairs", {}).values():
        medians = {k: v["median_s"] for k, v in pair["times"].items() if ":" not in k}
        for arm, seconds in medians.items():
            found.setdefault(arm, seconds / medians["l2"])
    return found


def aps() -> dict[str, dict[int, float]]:
    """AP on the digits' test set by arm and seed; "none" is the plain student."""
    found: dict[str, dict[int, float]] = {}
    for run in read(RECORDS).get("runs", {}).values():
        if "arm" in run:
            found.setdefault(run["arm"], {})[run["seed"]] = run["metrics"]["AP"]
    return found


def collect_losses(output: Path) -> None:
    """Write [iteration, loss_distill] by arm, of the first seed in a study's folder."""
    taken: dict[str, list[list[float]]] = {}
    for file in sorted(output.glob(f"*/*/*/*/{METRICS_FILE}")):
        loss = read_metrics(file.parent).series.get("loss_distill", Series())
        curve = [[iteration + 1, round(value, 4)] for iteration, value in loss.pairs()]
        if curve:
            # About every hundred iterations, and the last.
            taken.setdefault(file.parts[-4], [*curve[:-1:5], curve[-1]])
    found = read(LOSSES) | taken
    LOSSES.parent.mkdir(exist_ok=True)
    lines = ",\n".join(f" {json.dumps(k)}: {json.dumps(found[k])}" for k in sorted(found))
    LOSSES.write_text(f"{{\n{lines}\n}}\n")


def rows() -> Iterator[dict[str, str]]:
    """The cells of each project's row, by column."""
    cost, ap, curves = costs(), aps(), read(LOSSES)
    for name, folder in sorted(folders().items(), key=lambda item: item[1].name.lower()):
        found = summary(name)
        count = parameters(config_of(name, folder)) / 1e6
        yield {
            "method": f"[{found['method']}]({folder.name})",
            "paper": found["paper"],
            "levels or heads": found["levels"],
            "needs": found["needs"] or "-",
            "parameters": f"{count:.2f}M" if count else "0",
            "step / l2": f"{cost[name]:.2f}" if name in cost else "-",
            AP: _ap(ap.get(name, {}), ap.get("none", {})),
            "its loss": _fall(curves.get(name)),
        }


def _fall(curve: list[list[float]] | None) -> str:
    """The first and the last loss of a training."""
    return f"{curve[0][1]:.3g} to {curve[-1][1]:.3g}" if curve else "-"


def _ap(found: Mapping[int, float], plain: Mapping[int, float]) -> str:
    """Mean AP, mean gain over the plain student of the same seed, number of seeds."""
    pairs = [(ap, plain[seed]) for seed, ap in found.items() if seed in plain]
    if not pairs:
        return "-"
    mean, control = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return f"{mean:.1f} ({_signed(mean - control)}; {len(pairs)})"


def _signed(gain: float) -> str:
    """With one decimal; a zero is +0.0."""
    return f"{round(gain, 1) + 0.0:+.1f}"


def table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """In Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def notes() -> str:
    """The sources of the table's figures."""
    found = []
    if step := read(STEP):
        where = step["environment"]
        found.append(
            f"Step: {', '.join(step['pairs'])} at {step['size'][0]} x {step['size'][1]}, "
            f"{step['images']} image, {where['device']}, {where['threads']} thread, commit "
            f"{where['commit']}, the machine shared with other work. Medians; methods without a "
            "config for the first pair are of the other."
        )
    if records := read(RECORDS):
        students = [run for run in records["runs"].values() if "arm" in run]
        plain = ", ".join(f"{ap:.1f}" for _, ap in sorted(aps().get("none", {}).items()))
        commits = sorted({run["commit"] for run in students if run["arm"] != "none"})
        found.append(
            f"AP: [runs and intervals](../docs/results_methods.md), commits {', '.join(commits)}. "
            f"Gain: over the plain student of the same seed, which has {plain}; the mean over "
            "students of one teacher, and another teacher gives another. Loss weights are those of "
            "the configs for COCO; nothing was tuned for digits. FBKD, ICD and ReviewKD: of "
            "modules that began with larger random weights than the authors' do, and than today's."
        )
        found += on_retinanet()
    return "\n\n".join(found)


def on_retinanet() -> list[str]:
    """A sentence on the arms whose students are RetinaNets, if their plain student has run."""
    found = {arm.removesuffix(DENSE): ap for arm, ap in aps().items() if arm.endswith(DENSE)}
    plain = found.pop("none", {})
    if not plain or not found:
        return []
    arms = ", ".join(f"{arm} {_ap(ap, plain)}" for arm, ap in sorted(found.items()))
    mean = sum(plain.values()) / len(plain)
    return [f"On RetinaNet, stage `retinanet`: the plain student {mean:.1f} AP; {arms}."]


def measured(name: str) -> str:
    """What a project's README says of its runs on the digits: its arms and their intervals."""
    content = read(RECORDS) or {"runs": {}, "statistics": {}}
    distillers = set(importlib.import_module(f"ssim_kd.projects.{name}").__all__)
    arms = {
        run["arm"]
        for run in content["runs"].values()
        if "arm" in run and distillers & _distillers(run.get("opts", {}))
    }
    curves, found = read(LOSSES), []
    for stage in content["statistics"].values():
        for contrast in stage["contrasts"]:
            arm, gain = contrast["arm"], contrast["differences"]["AP"]
            if arm not in arms:
                continue
            interval = f" [{gain['low']:+.1f}, {gain['high']:+.1f}]" if gain["n"] > 1 else ""
            found.append(
                (
                    f"`{arm}`",
                    str(gain["n"]),
                    f"{stage['arms'][contrast['against']]['AP']['mean']:.1f}",
                    f"{stage['arms'][arm]['AP']['mean']:.1f}",
                    f"{_signed(gain['mean'])}{interval}",
                    _fall(curves.get(arm)),
                )
            )
    if not found:
        return "No run on the digits is recorded."
    old = ", of modules with larger random start weights than today's" if arms & OLD_STARTS else ""
    head = ("arm", "students", "plain student's AP", "AP", "gain [95%]", "its loss, one seed")
    return (
        "[On digits](../../docs/results_methods.md), with the loss weight of the config for COCO; "
        f"the interval is over students of one teacher{old}:\n\n{table(head, found)}"
    )


def _distillers(opts: Mapping[str, Any]) -> set[str]:
    """The names of the distillers of a run."""
    return {
        opts.get("MODEL.DISTILL.NAME", ""),
        *(t[0] for t in opts.get("MODEL.DISTILL.TERMS", ())),
    }


def write_between(readme: Path, begin: str, content: str, end: str) -> None:
    """Put a text between two marks of a file."""
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    readme.write_text(f"{before}{begin}\n{content}\n{end}{after}", encoding="utf-8")


def main() -> None:
    """Collect, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--losses", type=Path, help="folder of the runs of ssim-kd compare")
    args = parser.parse_args()
    if args.losses:
        if not args.losses.is_dir():
            parser.error(f"--losses {args.losses}: no such folder; expected that of a study's runs")
        collect_losses(args.losses)
    write_between(
        README, BEGIN, f"{table(COLUMNS, (row.values() for row in rows()))}\n\n{notes()}", END
    )
    for name, folder in folders().items():
        readme = folder / "README.md"
        if MEASURED not in readme.read_text(encoding="utf-8"):
            with readme.open("a", encoding="utf-8") as file:
                file.write(f"\n{MEASURED}\n{END_MEASURED}\n")
        write_between(readme, MEASURED, measured(name), END_MEASURED)


if __name__ == "__main__":
    main()
