"""Sheets of pictures: what distillation compares, level by level."""

import argparse
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.modeling import build_model
from jinja2 import Environment
from matplotlib import pyplot
from matplotlib.figure import Figure

from ssim_kd.checkpoint import load_strictly, read_file, read_weights
from ssim_kd.data import register_datasets
from ssim_kd.engine import load_config
from ssim_kd.engine.preflight import check_tested
from ssim_kd.projects import add_project_configs
from ssim_kd.visualization import PANELS, LossMaps, loss_maps, map_panels, pyramid_distiller, to_rgb

PAGE = Environment(autoescape=True).from_string("""<!doctype html>
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>What is distilled</title>
<style>
:root { color-scheme: light dark; } body { font: 15px system-ui, sans-serif; }
body { margin: clamp(12px, 3vw, 32px); overflow-wrap: anywhere; }
img { max-width: 100%; } div { overflow-x: auto; } table { border-collapse: collapse; }
td, th { padding: .2em .8em; text-align: right; }
</style>
<h1>What is distilled</h1>
<p>{{ weights }}; {{ data }}. Over each image, by level: {{ panels | join(", ") }}. Loss: black 0,
yellow 0.5 or more. Luminance, contrast, structure: black 1 (equal), yellow 0. Activations and l2:
each map's own range. The table holds the means over the images.</p>
<div><table><tr><th>level</th>{% for name in panels %}<th>{{ name }}</th>{% endfor %}</tr>
{% for level, means in table.items() %}<tr><th>{{ level }}</th>
{% for name in panels %}<td>{{ "%.4f" | format(means[name]) }}</td>{% endfor %}</tr>{% endfor %}
</table></div>
{% for name, title in sheets %}<h2>{{ title }}</h2>
<img src="{{ name }}" alt="{{ title }}" loading="lazy">
{% endfor %}
""")


def load_model(cfg: CfgNode) -> torch.nn.Module:
    """The model of a training, with the student and the distillers of its checkpoint."""
    key = "MODEL.WEIGHTS"
    _, checkpoint = read_file(cfg.MODEL.WEIGHTS, key=key)
    model = build_model(cfg).eval()
    if getattr(model, "teacher", None) is None:
        raise ValueError("MODEL.DISTILL.ENABLED is False: nothing to compare with.")
    load_strictly(model.student, read_weights(cfg.MODEL.WEIGHTS, key=key))
    state = checkpoint.get("distillers", {})
    missing = set(model.distillers.state_dict()) - set(state)
    if missing:
        raise ValueError(
            f"{key} is {cfg.MODEL.WEIGHTS!r}, which lacks the distillers' {sorted(missing)[:3]}; "
            "expected a checkpoint of the training, which holds its adapters."
        )
    model.distillers.load_state_dict(state)
    return model


def draw_sheet(
    image: np.ndarray, index: int, maps: dict[str, LossMaps], strides: dict[str, int]
) -> Figure:
    """A figure with a row a level and a column a panel."""
    names = ["image", *PANELS]
    size = (1.9 * len(names), 1.9 * len(maps) * image.shape[0] / image.shape[1] + 0.3)
    figure, axes = pyplot.subplots(
        len(maps), len(names), figsize=size, squeeze=False, layout="constrained"
    )
    for row, (level, found) in zip(axes, maps.items(), strict=True):
        panels = {"image": image, **map_panels(found, index, image, strides[level])}
        for axis, name in zip(row, names, strict=True):
            axis.imshow(panels[name])
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(level)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=9)
    return figure


def main(args: argparse.Namespace) -> None:
    """Draw the sheets and write their page; the arguments of ``ssim-kd visualize``."""
    args.eval_only = True  # for load_config: nothing is trained
    cfg = load_config(args, add_project_configs)
    check_tested(cfg)
    register_datasets(cfg)
    model = load_model(cfg)
    name = cfg.DATASETS.TEST[0]
    mapper = DatasetMapper(cfg, is_train=False)
    args.output.mkdir(parents=True, exist_ok=True)
    strides = pyramid_distiller(model).strides
    sheets, sums = [], {level: dict.fromkeys(PANELS, 0.0) for level in strides}
    records = DatasetCatalog.get(name)[: args.images]
    for number, record in enumerate(records):
        inputs = [mapper(record)]
        maps = loss_maps(model, inputs)
        image = to_rgb(inputs[0]["image"], cfg.INPUT.FORMAT)
        figure = draw_sheet(image, 0, maps, strides)
        sheets.append((f"{number:03d}.png", Path(record["file_name"]).name))
        figure.savefig(args.output / sheets[-1][0], dpi=110)
        pyplot.close(figure)
        for level, found in maps.items():
            for panel in PANELS:
                sums[level][panel] += float(getattr(found, panel).nanmean()) / len(records)
    page = PAGE.render(
        weights=cfg.MODEL.WEIGHTS, data=name, panels=list(PANELS), table=sums, sheets=sheets
    )
    (args.output / "index.html").write_text(page, encoding="utf-8")
    print(f"{len(sheets)} sheets and {args.output / 'index.html'}")
