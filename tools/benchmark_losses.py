"""Time, memory and accuracy of the SSIM loss against its peers, on this machine.

    python tools/benchmark_losses.py             # a CPU, one thread; or a GPU if there is one
    python tools/benchmark_losses.py --quick     # a check that everything runs

Writes ``benchmark_losses.json``, ``.md`` (tables) and ``.png`` into ``--output``. All losses take
turns in one process, so that a busy machine slows them alike. Peers that are not installed are left
out (``pip install '.[bench]'``). A *map* is N x C x H x W float32 elements.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

if __name__ == "__main__":  # before torch reads it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ssim_kd.losses import pyramid_ssim_loss, ssim_loss

Loss = Callable[[Tensor, Tensor], Tensor]
# p2 ... p6 of an 800 x 1333 image.
PYRAMID = {"p2": (200, 336), "p3": (100, 168), "p4": (50, 84), "p5": (25, 42), "p6": (13, 21)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def neutralise_malloc() -> bool:
    """Keep glibc from giving freed memory back: its page faults punish whoever allocates much."""
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    try:
        libc = ctypes.CDLL(None)
        settings = ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**28))
        return sum(libc.mallopt(name, value) for name, value in settings) == len(settings)
    except (OSError, AttributeError):
        return False


def losses(device: torch.device) -> dict[str, Loss]:
    """Ours and every peer that can be imported, by name; all are SSIM with an 11-wide Gaussian."""
    found: dict[str, Loss] = {"ours": lambda x, y: ssim_loss(x, y)}
    found["ours, min-max"] = lambda x, y: ssim_loss(x, y, scaling="channel")
    found["ours, reference"] = lambda x, y: ssim_loss(x, y, impl="reference")
    if device.type == "cuda":
        found["ours, eager"] = lambda x, y: ssim_loss(x, y, impl="eager")
    try:
        import kornia

        found["kornia"] = lambda x, y: kornia.losses.ssim_loss(x, y, 11)
    except ImportError:
        pass
    try:
        from pytorch_msssim import ssim

        found["pytorch-msssim"] = lambda x, y: 0.5 - 0.5 * ssim(x, y, data_range=1.0)
    except ImportError:
        pass
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure as measure

        found["torchmetrics"] = lambda x, y: torch.as_tensor(
            0.5 - 0.5 * cast(Tensor, measure(x, y, data_range=1.0))
        )
    except ImportError:
        pass
    try:
        import piq

        found["piq"] = lambda x, y: (1 - piq.ssim(x, y, downsample=False)) / 2
    except ImportError:
        pass
    if device.type == "cuda":
        try:
            from fused_ssim import fused_ssim

            found["fused-ssim"] = lambda x, y: (1 - fused_ssim(x, y)) / 2
        except ImportError:
            pass
    found["MSE"] = lambda x, y: torch.nn.functional.mse_loss(x, y)
    return found


def over_pyramid(name: str, loss: Loss) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
    """The sum over levels: one call for ours, a loop for the others."""
    if name == "ours":
        return lambda xs, ys: pyramid_ssim_loss(xs, ys)[0]
    if name == "ours, min-max":
        return lambda xs, ys: pyramid_ssim_loss(xs, ys, scaling="channel")[0]
    return lambda xs, ys: torch.stack([loss(x, y) for x, y in zip(xs, ys, strict=True)]).sum()


class Case:
    """One set of maps: a level or the pyramid, a batch size and a type."""

    def __init__(
        self, level: str, n: int, channels: int, dtype: str, device: torch.device, seed: int = 0
    ):
        sizes = list(PYRAMID.values()) if level == "pyramid" else [PYRAMID[level]]
        g = torch.Generator().manual_seed(seed)
        self.level, self.n, self.dtype, self.device = level, n, dtype, device
        self.elements = sum(n * channels * h * w for h, w in sizes)

        def make() -> list[Tensor]:
            maps = (torch.rand(n, channels, h, w, generator=g) for h, w in sizes)
            return [m.to(device, DTYPES[dtype]) for m in maps]

        self.inputs, self.targets = make(), make()

    def run(self, name: str, loss: Loss, backward: bool) -> None:
        """One pass, gradients dropped beforehand as an optimizer's ``zero_grad`` does."""
        for x in self.inputs:
            x.grad = None
            x.requires_grad_(backward)
        total = over_pyramid(name, loss)(self.inputs, self.targets)
        if backward:
            total.backward()


def clock(case: Case, name: str, loss: Loss, backward: bool) -> float:
    """Seconds of one pass. On a CPU the processor's time: other programs do not count."""
    if case.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        case.run(name, loss, backward)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.process_time_ns() if torch.get_num_threads() == 1 else time.perf_counter_ns()
    case.run(name, loss, backward)
    end_ns = time.process_time_ns() if torch.get_num_threads() == 1 else time.perf_counter_ns()
    return (end_ns - begin) / 1e9


def time_all(
    case: Case, found: dict[str, Loss], backward: bool, repeats: int, budget: float
) -> dict[str, dict[str, Any]]:
    """Median and quartiles in ms of every loss, taking turns, within ``budget`` seconds."""
    times: dict[str, list[float]] = {name: [] for name in found}
    errors: dict[str, str] = {}
    begin = time.monotonic()
    for turn in range(repeats + 2):
        if turn >= 5 and time.monotonic() - begin > budget:
            break
        for name, loss in found.items():
            if name in errors:
                continue
            try:
                seconds = clock(case, name, loss, backward)
            except Exception as error:
                errors[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
                continue
            if turn >= 2:  # the first two warm up
                times[name].append(seconds * 1e3)
    result: dict[str, dict[str, Any]] = {name: {"error": e} for name, e in errors.items()}
    for name, values in times.items():
        if len(values) >= 2:
            low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
            result[name] = {"median": middle, "q1": low, "q3": high, "runs": len(values)}
    return result


def saved_maps(case: Case, name: str, loss: Loss) -> float:
    """What autograd keeps for backward beyond the inputs, in maps; shared storage counted once."""
    kept: dict[int, int] = {}
    mine = {t.untyped_storage().data_ptr() for t in case.inputs + case.targets}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in mine:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    for x in case.inputs:
        x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        total = over_pyramid(name, loss)(case.inputs, case.targets)
    del total
    return sum(kept.values()) / (4 * case.elements)


def peak_maps(case: Case, name: str, loss: Loss) -> float:
    """The most memory that one pass allocates at a time beyond its inputs, in maps."""
    for x in case.inputs:
        x.grad = None
        x.requires_grad_()
    gc.collect()
    if case.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case.run(name, loss, True)
        return (torch.cuda.max_memory_allocated() - before) / (4 * case.elements)
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activity, profile_memory=True) as profile:
        case.run(name, loss, True)
    now = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / (4 * case.elements)


def launches(case: Case, name: str, loss: Loss) -> int | None:
    """Kernels that one pass starts on a GPU."""
    if case.device.type != "cuda":
        return None
    case.run(name, loss, True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        case.run(name, loss, True)
        torch.cuda.synchronize()
    return sum(e.count for e in profile.key_averages() if "emcpy" not in e.key)


def accuracy(found: dict[str, Loss], device: torch.device) -> list[dict[str, Any]]:
    """Errors in float32 against the same loss in float64: value, and gradient (relative L2)."""
    rows: list[dict[str, Any]] = []
    g = torch.Generator().manual_seed(1)
    base = torch.rand(1, 8, 50, 84, generator=g), torch.rand(1, 8, 50, 84, generator=g)
    for kind, offset, spread in (("random", 0.0, 1.0), ("near-constant", 0.5, 1e-3)):
        x, y = ((offset + spread * m).to(device) for m in base)
        for name, loss in found.items():
            exact = "ours, reference" if name == "ours" or name == "ours, eager" else name
            try:
                grads, values = [], []
                for dtype, f in ((torch.float32, loss), (torch.float64, found[exact])):
                    t = x.to(dtype).requires_grad_()
                    value = f(t, y.to(dtype))
                    grads.append(torch.autograd.grad(value, t)[0].double())
                    values.append(value.item())
                error = ((grads[0] - grads[1]).norm() / grads[1].norm()).item()
                value_error = abs(values[0] - values[1])
            except Exception as problem:
                rows.append({"kind": kind, "loss": name, "error": str(problem)[:120]})
                continue
            rows.append({"kind": kind, "loss": name, "value": value_error, "gradient": error})
    return rows


def environment(device: torch.device, malloc: bool) -> dict[str, Any]:
    """Hardware, versions and commit."""
    versions = {}
    for name in (
        "torch",
        "triton",
        "kornia",
        "pytorch-msssim",
        "torchmetrics",
        "piq",
        "fused-ssim",
    ):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [v for v in cpuinfo.read_text().splitlines() if v.startswith("model name")]
        processor = lines[0].split(":", 1)[1].strip() if lines else processor
    try:
        here = Path(__file__).resolve().parent
        git = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or processor,
        "cpu": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "malloc neutralised": malloc,
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
        "load": os.getloadavg(),
    }


def tables(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    env = report["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in env["versions"].items())
    out = [f"{env['device']}, {env['threads']} thread(s), {env['instructions']}; {versions}; "]
    out[0] += f"commit {env['commit']}. Medians (quartiles) in ms.\n"
    for what in ("forward+backward", "forward"):
        rows = [r for r in report["times"] if r["pass"] == what]
        if not rows:
            continue
        names = list(dict.fromkeys(n for r in rows for n in r["ms"]))
        out += [
            f"\n### {what}\n",
            "| maps | " + " | ".join(names) + " |",
            "|---" * (len(names) + 1) + "|",
        ]
        for r in rows:
            cells = []
            for name in names:
                ms = r["ms"].get(name, {})
                text = (
                    f"{ms['median']:.1f} ({ms['q1']:.1f}-{ms['q3']:.1f})" if "median" in ms else "-"
                )
                cells.append(text)
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
    rows = [r for r in report["times"] if r["pass"] == "forward+backward" and r["dtype"] == "fp32"]
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


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--levels", nargs="+", default=[*PYRAMID, "pyramid"], choices=[*PYRAMID, "pyramid"]
    )
    parser.add_argument(
        "--batch", nargs="+", type=int, help="batch sizes; 1 2 8 on a GPU, 2 on a CPU"
    )
    parser.add_argument("--channels", type=int, help="256 on a GPU, 64 on a CPU")
    parser.add_argument("--dtypes", nargs="+", default=["fp32"], choices=list(DTYPES))
    parser.add_argument(
        "--repeats", type=int, default=15, help="turns at most, after two to warm up"
    )
    parser.add_argument(
        "--budget", type=float, default=60.0, help="seconds a row, after five turns"
    )
    parser.add_argument("--forward", action="store_true", help="time forward by itself as well")
    parser.add_argument("--quick", action="store_true", help="8 channels, small levels, 3 turns")
    parser.add_argument("--output", type=Path, default=Path("output/benchmark_losses"))
    args = parser.parse_args()

    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    malloc = neutralise_malloc()
    if args.quick:
        args.levels, args.channels, args.repeats = ["p4", "p6"], 8, 3
    channels = args.channels or (256 if on_gpu else 64)
    batches = args.batch or ([1, 2, 8] if on_gpu else [2])
    found = losses(device)
    # The reference is for reading, not for speed: several times slower than any other.
    timed = {k: v for k, v in found.items() if k != "ours, reference"}
    report: dict[str, Any] = {"environment": environment(device, malloc), "times": [], "memory": []}
    for dtype in args.dtypes:
        for n in batches:
            for level in args.levels:
                case = Case(level, n, channels, dtype, device)
                for backward in (True, False) if args.forward else (True,):
                    ms = time_all(case, timed, backward, args.repeats, args.budget)
                    row = {"level": level, "n": n, "channels": channels, "dtype": dtype, "ms": ms}
                    row["pass"] = "forward+backward" if backward else "forward"
                    row["elements"] = case.elements
                    report["times"].append(row)
                    medians = {k: round(v["median"], 2) for k, v in ms.items() if "median" in v}
                    print(level, f"N={n}", dtype, row["pass"], medians, flush=True)
    # Large enough that the few megabytes of scratch of a chunk are small beside a map.
    case = Case("pyramid" if on_gpu else "p3", 2, 256, "fp32", device)
    for name, loss in found.items():
        saved, peak = saved_maps(case, name, loss), peak_maps(case, name, loss)
        count = launches(case, name, loss)
        report["memory"].append({"loss": name, "saved": saved, "peak": peak, "launches": count})
    report["accuracy"] = accuracy(found, device)
    report["environment"]["peak resident KiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / "benchmark_losses"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(tables(report))
    plot(report, stem.with_suffix(".png"))
    print(tables(report))


if __name__ == "__main__":
    main()
