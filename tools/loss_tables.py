"""The figures of ``benchmark_losses.py`` as tables and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.benchmarking import describe


def tables(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    names = list(dict.fromkeys(n for r in report["times"] for n in r["ms"]))
    out = [
        f"{describe(report['environment'])}. Medians (quartiles) of forward and backward in ms.\n",
        "| maps | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for r in report["times"]:
        found = (r["ms"].get(name, {}) for name in names)
        cells = [
            f"{ms['median']:.1f} ({ms['q1']:.1f}-{ms['q3']:.1f})" if "median" in ms else "-"
            for ms in found
        ]
        maps = f"{r['level']}, N={r['n']}, {r['channels']} ch, {r['dtype']}"
        out.append(f"| {maps} | " + " | ".join(cells) + " |")
    out += ["\n### memory, in maps\n", "| loss | saved | peak | launches |", "|---|---|---|---|"]
    for r in report["memory"]:
        out.append(f"| {r['loss']} | {r['saved']:.2f} | {r['peak']:.2f} | {r['launches'] or '-'} |")
    out += [
        "\n### float32 against float64\n",
        "| maps | loss | value | gradient |",
        "|---|---|---|---|",
    ]
    for r in report["accuracy"]:
        if "gradient" in r:
            out.append(f"| {r['kind']} | {r['loss']} | {r['value']:.1e} | {r['gradient']:.1e} |")
    return "\n".join(out) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of forward+backward in ns an element, float32; without matplotlib nothing is drawn."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    rows = [r for r in report["times"] if r["dtype"] == "fp32"]
    names = list(dict.fromkeys(n for r in rows for n in r["ms"] if "median" in r["ms"][n]))
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        here = [(j, r) for j, r in enumerate(rows) if "median" in r["ms"].get(name, {})]
        heights = [r["ms"][name]["median"] * 1e6 / r["elements"] for _, r in here]
        axes.bar([j + i * width for j, _ in here], heights, width, label=name)
    axes.set_xticks(
        [j + 0.4 for j in range(len(rows))], [f"{r['level']}\nN={r['n']}" for r in rows]
    )
    axes.set_ylabel("ns an element, forward+backward")
    axes.set_yscale("log")
    axes.set_title(report["environment"]["device"])
    axes.legend(fontsize=7, ncols=3)
    figure.savefig(path, dpi=120)
