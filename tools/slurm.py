#!/usr/bin/env python
"""Submit a training to SLURM, which resumes by itself after a preemption or the time limit.

    tools/slurm.py --nodes 2 --gpus-per-node 8 --partition gpu --time 24:00 -- \\
        --config-file my_detector.yaml --teacher output/teacher OUTPUT_DIR output/distilled

After "--" comes the command line of train_net.py, without --num-gpus, --num-machines: each GPU has
a task of SLURM. Before the limit and when it is preempted the training saves and ends, and the job
is queued again with --resume. "--cluster local" does the same on this machine, without SLURM.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import submitit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ssim_kd.command_line import argument_parser  # noqa: E402
from ssim_kd.comparing.running import build_executor  # noqa: E402

#: Status of a training that SIGTERM ended: saved; not saved in time.
STOPPED = (143, 75)
# Times that a job may reach its limit.
_TIMEOUTS = 1000


class Training:
    """A task of the job: runs the command, and can be sent through submitit's queue again."""

    def __init__(self, script: str, arguments: list[str], *, resume: bool = False) -> None:
        """
        Args:
            script: train_net.py.
            arguments: its command line.
            resume: whether it continues from a checkpoint.
        """
        self.script, self.arguments, self.resume = script, arguments, resume
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Train to the end.

        Raises:
            RuntimeError: the training failed, or was cancelled.
        """
        # Where SLURM itself has queued the job again, nobody called checkpoint().
        resume = self.resume or int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        flags = ["--resume"] if resume and "--resume" not in self.arguments else []
        command = [sys.executable, self.script, *flags, *self.arguments]
        self._process = subprocess.Popen(command, preexec_fn=_ignore_signals_of_submitit)
        try:
            status = self._wait()
        except BaseException:
            self._process.terminate()
            self._wait()
            raise
        # If it was stopped for a requeue, the first task's process sends the job off.
        requeued = status in STOPPED and submitit.JobEnvironment().global_rank > 0
        if status and not requeued:
            raise RuntimeError(f"{' '.join(command)} ended with status {status}")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Let the training save and end, in the handler of submitit's signal; see submitit."""
        if self._process is not None:
            # One process is enough: all of a training stop after the same step.
            self._process.terminate()
            self._wait()
        return submitit.helpers.DelayedSubmission(
            Training(self.script, self.arguments, resume=True)
        )

    def _wait(self) -> int:
        # Popen.wait() holds a lock that the handler, in the same thread, would wait for.
        assert self._process is not None
        while self._process.poll() is None:
            time.sleep(0.1)
        return int(self._process.returncode)


def _ignore_signals_of_submitit() -> None:
    """In the training, which receives them from SLURM too."""
    for name in {os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"), "USR2", "USR1"}:
        signal.signal(getattr(signal, f"SIG{name}"), signal.SIG_IGN)


def minutes(text: str) -> int:
    """ "90" or "1:30", in hours and minutes, or "2-12:00" with days, as a number of minutes."""
    days, _, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if len(parts) > 2:
        raise argparse.ArgumentTypeError(f"{text!r}; expected MINUTES, HOURS:MINUTES or D-HH:MM")
    hours = parts[0] if len(parts) == 2 else 0
    return int(days or 0) * 24 * 60 + hours * 60 + parts[-1]


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; ``training`` is what is after "--", as train_net.py reads it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=0)
    parser.add_argument("--tasks-per-node", type=int, help="default: one a GPU, at least one")
    parser.add_argument("--cpus-per-task", type=int, help="default: SLURM's")
    parser.add_argument("--partition")
    parser.add_argument("--time", type=minutes, default=24 * 60, help="MINUTES, H:MM or D-HH:MM")
    parser.add_argument(
        "--signal-delay", type=int, default=120, help="seconds before the limit to save at"
    )
    parser.add_argument("--name", default="ssim_kd")
    parser.add_argument("--folder", type=Path, default=Path("output/slurm"), help="of the logs")
    parser.add_argument(
        "--submitit", nargs="+", default=[], metavar="NAME=VALUE", help="e.g. slurm_account=vision"
    )
    parser.add_argument("--cluster", default="slurm", choices=["slurm", "local"])
    parser.add_argument("--script", default=str(ROOT / "train_net.py"), help="a train_net.py")
    parser.add_argument("--print", action="store_true", help="only show the sbatch script")
    place = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:place])
    args.arguments = argv[place + 1 :]
    if not args.arguments:
        parser.error('expected "--" and the command line of train_net.py')
    training = argument_parser().parse_args(args.arguments)
    if training.num_gpus > 1 or training.num_machines > 1:
        parser.error("--num-gpus and --num-machines follow from --nodes and --gpus-per-node")
    if args.cluster == "local" and args.nodes > 1:
        parser.error("--cluster local has one node")
    return args


def submit(args: argparse.Namespace) -> submitit.Job[Any] | str:
    """Submit the training of :func:`parse`.

    Returns:
        the job; the script for sbatch instead with ``args.print``.
    """
    tasks = args.tasks_per_node or max(args.gpus_per_node, 1)
    arguments = list(args.arguments)
    if args.cluster == "local" and tasks > 1:
        # One task, which starts the processes itself.
        arguments, tasks = ["--num-gpus", str(tasks), *arguments], 1
    parameters: dict[str, Any] = {
        "name": args.name,
        "nodes": args.nodes,
        "gpus_per_node": args.gpus_per_node or None,
        "tasks_per_node": tasks,
        "cpus_per_task": args.cpus_per_task,
        "timeout_min": args.time,
        "slurm_partition": args.partition,
        "slurm_signal_delay_s": args.signal_delay,
        "slurm_additional_parameters": {"requeue": True},
    }
    given = {name: value for name, value in parameters.items() if value is not None}
    extra = dict(pair.split("=", 1) for pair in args.submitit)
    folder = args.folder.resolve()
    executor = build_executor(args.cluster, folder, 0, {**given, **extra}, max_timeouts=_TIMEOUTS)
    if args.print:
        inner = executor._executor  # type: ignore[attr-defined]
        return str(inner._make_submission_file_text(inner._submitit_command_str, "print"))
    return executor.submit(Training(args.script, arguments))


def main(argv: list[str] | None = None) -> int:
    """Submit, and print where to look."""
    try:
        job = submit(parse(sys.argv[1:] if argv is None else argv))
    except RuntimeError as error:  # submitit finds no SLURM
        print(f"ERROR: {error} Or try --cluster local.", file=sys.stderr)
        return 1
    if isinstance(job, str):
        print(job)
    else:
        print(f"Job {job.job_id}; log: {job.paths.stdout}; errors: {job.paths.stderr}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
