"""Sheets of pictures: what distillation compares, level by level."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from matplotlib import pyplot
from matplotlib.figure import Figure

from ssim_kd.checkpoint import load_strictly, read_file, read_weights
from ssim_kd.engine import DistillTrainer
from ssim_kd.engine.defaults import recipe_of
from ssim_kd.engine.settings import Settings
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
<p>{{ weights }}. Over each image, by level: {{ panels | join(", ") }}. Loss: black 0,
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


def load_weights(model: Any, settings: Settings) -> None:
    """Load the student and the distillers of a training's checkpoint."""
    path, key = settings.weights, settings.key("weights")
    _, checkpoint = read_file(path, key=key)
    load_strictly(model.student, read_weights(path, key=key))
    state = checkpoint.get("distillers", {})
    missing = set(model.distillers.state_dict()) - set(state)
    if missing:
        raise ValueError(
            f"{key} is {path!r}, which lacks the distillers' {sorted(missing)[:3]}; "
            "expected a checkpoint of the training, which holds its adapters."
        )
    model.distillers.load_state_dict(state)


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
    args.eval_only = True  # nothing is trained
    recipe = recipe_of(args, add_project_configs, DistillTrainer)
    settings = recipe.settings()
    inputs, model = recipe.pictures(args.images), recipe.model().eval()
    strides = pyramid_distiller(model).strides
    load_weights(model, settings)
    args.output.mkdir(parents=True, exist_ok=True)
    sheets, sums = [], {level: dict.fromkeys(PANELS, 0.0) for level in strides}
    for number, record in enumerate(inputs):
        maps = loss_maps(model, [record])
        image = to_rgb(record["image"], settings.image_format)
        figure = draw_sheet(image, 0, maps, strides)
        sheets.append((f"{number:03d}.png", Path(record["file_name"]).name))
        figure.savefig(args.output / sheets[-1][0], dpi=110)
        pyplot.close(figure)
        for level, found in maps.items():
            for panel in PANELS:
                sums[level][panel] += float(getattr(found, panel).nanmean()) / len(inputs)
    page = PAGE.render(weights=settings.weights, panels=list(PANELS), table=sums, sheets=sheets)
    (args.output / "index.html").write_text(page, encoding="utf-8")
    print(f"{len(sheets)} sheets and {args.output / 'index.html'}")
