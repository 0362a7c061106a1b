"""Time, memory and accuracy of the SSIM loss against its peers, on this machine.

    python tools/benchmark_losses.py             # a CPU, one thread; or a GPU if there is one
    python tools/benchmark_losses.py --quick     # a check that everything runs

Writes ``benchmark_losses.json``, ``.md`` (tables) and ``.png`` into ``--output``. All losses take
turns in one process, so that a busy machine slows them alike. Peers that are not installed are left
out (``pip install -e '.[bench]'``). A *map* is N x C x H x W float32 elements.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch reads it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.benchmarking import environment, neutralise_malloc
from tools.loss_cases import DTYPES, PYRAMID, Case, Loss, losses, over_pyramid
from tools.loss_tables import plot, tables


def clock(case: Case, name: str, loss: Loss) -> float:
    """Seconds of one pass. On a CPU the processor's time: other programs do not count."""
    if case.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        case.run(name, loss)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = now()
    case.run(name, loss)
    return now() - begin


def time_all(case: Case, found: dict[str, Loss], turns: int) -> dict[str, dict[str, Any]]:
    """Median and quartiles in ms of every loss, taking turns, within a minute or five turns."""
    times: dict[str, list[float]] = {name: [] for name in found}
    errors: dict[str, str] = {}
    begin = time.monotonic()
    for turn in range(turns + 2):
        if turn >= 5 and time.monotonic() - begin > 60:
            break
        for name, loss in found.items():
            if name in errors:
                continue
            try:
                seconds = clock(case, name, loss)
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
        case.run(name, loss)
        return (torch.cuda.max_memory_allocated() - before) / (4 * case.elements)
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activity, profile_memory=True) as profile:
        case.run(name, loss)
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
    case.run(name, loss)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        case.run(name, loss)
        torch.cuda.synchronize()
    return sum(
        event.count
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.key.startswith(("Memcpy", "Memset"))
    )


def accuracy(found: dict[str, Loss], device: torch.device) -> list[dict[str, Any]]:
    """Errors in float32 against the same loss in float64: value, and gradient (relative L2)."""
    rows: list[dict[str, Any]] = []
    g = torch.Generator().manual_seed(1)
    base = torch.rand(1, 8, 50, 84, generator=g), torch.rand(1, 8, 50, 84, generator=g)
    for kind, offset, spread in (("random", 0.0, 1.0), ("near-constant", 0.5, 1e-3)):
        x, y = ((offset + spread * m).to(device) for m in base)
        for name, loss in found.items():
            exact = "ours, reference" if name in ("ours", "ours, eager") else name
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
        "--quick", action="store_true", help="8 channels, small levels, less memory"
    )
    parser.add_argument("--output", type=Path, default=Path("output/benchmark_losses"))
    args = parser.parse_args()

    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    malloc = neutralise_malloc()
    if args.quick:
        args.levels, args.channels = ["p4", "p6"], 8
    channels = args.channels or (256 if on_gpu else 64)
    batches = args.batch or ([1, 2, 8] if on_gpu else [2])
    found = losses(device)
    # The reference is for reading, not for speed: several times slower than any other.
    timed = {k: v for k, v in found.items() if k != "ours, reference"}
    report: dict[str, Any] = {"environment": environment(device), "times": [], "memory": []}
    for dtype in args.dtypes:
        for n in batches:
            for level in args.levels:
                case = Case(level, n, channels, dtype, device)
                ms = time_all(case, timed, 3 if args.quick else 15)
                row = {"level": level, "n": n, "channels": channels, "dtype": dtype, "ms": ms}
                report["times"].append({**row, "elements": case.elements})
                medians = {k: round(v["median"], 2) for k, v in ms.items() if "median" in v}
                print(level, f"N={n}", dtype, medians, flush=True)
    # Large enough that the few megabytes of scratch of a chunk are small next to a map.
    case = Case("pyramid" if on_gpu else "p3", 2, 256, "fp32", device)
    for name, loss in found.items():
        if args.quick and name != "ours":
            continue
        saved, peak = saved_maps(case, name, loss), peak_maps(case, name, loss)
        count = launches(case, name, loss)
        report["memory"].append({"loss": name, "saved": saved, "peak": peak, "launches": count})
    report["environment"]["malloc neutralised"] = malloc
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
