"""SIGTERM, processes that die and runs that meet, with real processes and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.engine import inside
from tests.engine.runs import ROOT, World, checkpoint, children, free_port, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

LONG = (
    *("SOLVER.MAX_ITER", 2000, "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", 5000),
    *("DATASETS.TEST", "()"),
)
# A step takes 0.2 s; what a process may take to end, in seconds.
SOON = 15


def record(folder: Path) -> partial:
    return partial(inside.record_steps, str(folder))


def begun(folder: Path, rank: int = 0, steps: int = 2) -> None:
    path = folder / f"steps_rank{rank}.jsonl"
    wait_until(lambda: path.exists() and len(path.read_text().splitlines()) >= steps, 120)


def members(group: int) -> list[int]:
    """Processes of a session that are alive."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == group and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_workers(number, world: World, tmp_path) -> None:
    """As from a shell or a cluster: to the group of processes."""
    line = world.arguments(tmp_path, *LONG, "DATALOADER.NUM_WORKERS", 2)
    with children(line, folder=tmp_path, prepare=record(tmp_path)) as (run,):
        begun(tmp_path)
        assert len(members(run.pid)) > 2
        os.killpg(run.pid, number)
        assert run.wait(SOON) == 143, run.output[-3000:]
        # Python's servers (of forks, of resources) end later, the busier the machine is.
        wait_until(lambda: not members(run.pid), 30)
    done = len((tmp_path / "steps_rank0.jsonl").read_text().splitlines())
    assert (tmp_path / "last_checkpoint").read_text() == f"model_{done - 1:07d}.pth"


def test_sigterm_while_another_process_hangs(world: World, tmp_path) -> None:
    """It waits inside of torch, where Python runs no handler."""
    line = world.arguments(tmp_path, *LONG, "SOLVER.GRACE_PERIOD", 1)
    with children(line, line, folder=tmp_path, prepare=record(tmp_path)) as ranks:
        begun(tmp_path)
        ranks[1].signal(signal.SIGSTOP)
        time.sleep(0.5)
        ranks[0].signal(signal.SIGTERM)
        assert ranks[0].wait(10) == 75
        assert "Not saved within SOLVER.GRACE_PERIOD (1 s)." in ranks[0].output


def test_sigterm_twice_while_saving(world: World, tmp_path) -> None:
    line = world.arguments(tmp_path, *LONG, "SOLVER.CHECKPOINT_PERIOD", 3)
    slow = partial(inside.all_of, [record(tmp_path), partial(inside.slow_writes, 0.3)])
    with children(line, folder=tmp_path, prepare=slow) as (run,):
        # Files that are written before the training begins are not checkpoints.
        wait_until(lambda: list(tmp_path.glob("model_*.tmp")), 120)
        run.signal(signal.SIGTERM)
        run.signal(signal.SIGTERM)
        assert run.wait(SOON) == 143
    assert not list(tmp_path.glob("*.tmp"))
    checkpoint(tmp_path, (tmp_path / "last_checkpoint").read_text().removesuffix(".pth"))


@pytest.mark.parametrize("launcher", ["spawn", "torchrun", "spawn, Ctrl-C"])
def test_sigterm_to_the_launcher_of_two_processes(launcher, world: World, tmp_path) -> None:
    launcher, _, interrupt = launcher.partition(", ")
    options = (*LONG, "DATALOADER.NUM_WORKERS", 1, "SOLVER.CHECKPOINT_PERIOD", 2)
    line = world.arguments(tmp_path, *options, *(["--num-gpus"] if launcher == "spawn" else []))
    run, session = start(launcher, line, tmp_path)
    # Workers of spawned processes are spawned, which takes long.
    wait_until((tmp_path / "model_0000001.pth").exists, 180)
    begin = time.monotonic()
    if interrupt:  # a terminal sends it to all
        os.killpg(session, signal.SIGINT)
    else:
        os.kill(run.pid, signal.SIGTERM)
    code = run.wait(60)
    print(f"{launcher}: exit {code}, {time.monotonic() - begin:.1f} s after SIGTERM")
    # torchrun's own status is 1 after a signal.
    assert code == (143 if launcher == "spawn" else 1), log(tmp_path)[-3000:]
    assert "saving a checkpoint" in log(tmp_path)
    checkpoint(tmp_path, (tmp_path / "last_checkpoint").read_text().removesuffix(".pth"))
    wait_until(lambda: not members(session), 5)


def start(launcher: str, line: list[str], folder: Path) -> tuple[subprocess.Popen, int]:
    """Start train_net.py for two processes in a new session."""
    module = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    if launcher == "spawn":
        module, line = [], [*line[:2], "--dist-url=auto", *line[2:]]
    with open(folder / "launcher.txt", "wb") as output:
        run = subprocess.Popen(
            [sys.executable, *module, str(ROOT / "train_net.py"), *line],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    return run, run.pid


def log(folder: Path) -> str:
    return (folder / "launcher.txt").read_text(errors="replace")


@pytest.mark.parametrize("victim", ["rank 1", "rank 0", "parent"])
def test_sigkill_of_one_process(victim, world: World, tmp_path) -> None:
    line = world.arguments(tmp_path, *LONG, "--num-gpus")
    run, session = start("spawn", line, tmp_path)
    wait_until(lambda: "Starting training" in log(tmp_path), 180)
    time.sleep(1)
    tasks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    # The first child may be Python's resource tracker.
    ranks = [
        int(pid) for pid in tasks if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(ranks) == 2
    begin = time.monotonic()
    os.kill({"rank 0": ranks[0], "rank 1": ranks[1], "parent": run.pid}[victim], signal.SIGKILL)
    code = run.wait(60)
    wait_until(lambda: not members(session), 60)
    print(f"{victim}: exit {code}, all ended {time.monotonic() - begin:.1f} s after SIGKILL")
    assert code != 0 and time.monotonic() - begin < 40
    if victim != "parent":
        assert "terminated with signal SIGKILL" in log(tmp_path)


@pytest.mark.parametrize("seconds", [0.4, 1.5, 3])
def test_sigkill_of_the_parent_at_the_start(seconds, world: World, tmp_path) -> None:
    run, session = start("spawn", world.arguments(tmp_path, *LONG, "--num-gpus"), tmp_path)
    # The resource tracker, and a rank.
    wait_until(lambda: len(members(session)) > 2, 60)
    time.sleep(seconds)
    run.kill()
    run.wait()
    # A rank ends when it has imported all, which is long on a busy machine.
    wait_until(lambda: not members(session), 120)
    assert "Starting training" not in log(tmp_path)


def test_sigterm_to_the_parent_at_the_start(world: World, tmp_path) -> None:
    run, session = start("spawn", world.arguments(tmp_path, *LONG, "--num-gpus"), tmp_path)
    wait_until(lambda: len(members(session)) > 2, 60)
    time.sleep(0.5)
    run.terminate()
    assert run.wait(30) == 143
    assert "Traceback" not in log(tmp_path)
    wait_until(lambda: not members(session), 5)


def test_output_dir_in_use(world: World, tmp_path) -> None:
    line = world.arguments(tmp_path, *LONG)
    with children(line, folder=tmp_path, prepare=record(tmp_path)) as (first,):
        begun(tmp_path)
        other = world.arguments(tmp_path, *LONG, "SOLVER.BASE_LR", 0.5)
        with children(other, folder=tmp_path / "second") as (second,):
            assert second.wait(60) == 1
            assert f"which another run uses (process {first.pid} on" in second.output
        assert "BASE_LR: 0.01" in (tmp_path / "config.yaml").read_text()
        first.signal(signal.SIGKILL)
        first.wait()
    # The lock went with the process.
    short = world.arguments(tmp_path, "SOLVER.MAX_ITER", 1)
    with children(short, folder=tmp_path / "third") as (third,):
        assert third.wait() == 0


def test_error_before_training_in_one_process(world: World, tmp_path) -> None:
    """Only rank 1 cannot find its teacher: both end."""
    hidden = partial(inside.hide_from, str(world.teacher), 1)
    line = world.arguments(tmp_path, *LONG)
    with children(line, line, folder=tmp_path, prepare=hidden) as ranks:
        assert ranks[1].wait(60) == 1
        assert "MODEL.DISTILL.TEACHER.WEIGHTS is" in ranks[1].output
        assert ranks[0].wait(60) != 0
