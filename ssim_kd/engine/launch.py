"""Processes (this one, spawned ones, or those of torchrun or SLURM), and errors of their start."""

import argparse
import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm
from torch.multiprocessing import ProcessRaisedException

from ..sharing import without_queries
from .signals import (
    EXIT_INTERRUPTED,
    EXIT_NOT_SAVED,
    EXIT_STOPPED,
    Stopped,
    die_with_parent,
    forward_signals,
)

logger = logging.getLogger("ssim_kd")

# What torchrun sets in addition to RANK.
_VARIABLES = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

#: How long a process waits for another.
TIMEOUT = timedelta(minutes=30)


def launch_processes(
    main: Callable[..., Any], args: argparse.Namespace, *, device: str, main_args: tuple
) -> Any:
    """Run ``main(*main_args)`` in the processes that the command line or the launcher asks for.

    - ``RANK`` in the environment (torchrun and the like): this process is one of them.
    - more than one task in this step of SLURM: likewise.
    - else ``--num-gpus`` x ``--num-machines`` > 1: that many, of which those of this machine are
      spawned, over NCCL, or Gloo on CPUs.

    Args:
        main: picklable.
        args: of :func:`ssim_kd.engine.argument_parser`.
        device: "cuda" or "cpu".
        main_args: arguments of ``main``.

    Returns:
        what ``main`` returns if it runs in this process, else None.

    Raises:
        ValueError: the numbers contradict the environment or one another.
    """
    cuda = device.startswith("cuda")
    environment = _rank_from_environment()
    _check_numbers(args, environment, cuda=cuda)
    if environment is not None:
        os.environ.update(environment)
        _join(
            cuda=cuda,
            init_method="env://",
            local_rank=int(environment["LOCAL_RANK"]),
            ranks_per_machine=int(environment["LOCAL_WORLD_SIZE"]),
        )
        return _run_and_leave(main, main_args)
    processes = args.num_gpus * args.num_machines
    if processes <= 1:
        return main(*main_args)
    ranks = (cuda, processes, args.num_gpus, args.machine_rank, _free_url(args))
    try:
        with forward_signals():
            given = (*ranks, os.getpid(), main, main_args)
            mp.spawn(_spawned, nprocs=args.num_gpus, args=given)
    except mp.ProcessExitedException as error:
        # A process that SIGTERM itself ended had not begun to train.
        if error.exit_code in (EXIT_STOPPED, -signal.SIGTERM):
            raise Stopped from None
        if error.exit_code in (EXIT_NOT_SAVED, EXIT_INTERRUPTED):
            raise SystemExit(error.exit_code) from None
        raise
    return None


def _spawned(
    local_rank: int,
    cuda: bool,
    world_size: int,
    per_machine: int,
    machine_rank: int,
    url: str,
    parent: int,
    main: Callable[..., Any],
    main_args: tuple,
) -> None:
    # First: the next lines wait for the other processes.
    die_with_parent(parent)
    _join(
        cuda=cuda,
        init_method=url,
        local_rank=local_rank,
        ranks_per_machine=per_machine,
        world_size=world_size,
        rank=machine_rank * per_machine + local_rank,
    )
    _run_and_leave(main, main_args)


def _run_and_leave(main: Callable[..., Any], main_args: tuple) -> Any:
    result = main(*main_args)
    # Not after an exception: it waits for the others.
    dist.destroy_process_group()
    return result


def _join(
    *, cuda: bool, init_method: str, local_rank: int, ranks_per_machine: int, **rank: Any
) -> None:
    """Join the process group, and make the group of this machine, which Detectron2 needs."""
    if cuda:
        # SLURM may show each process only its own GPU, which is then number 0.
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    else:
        # By default each process takes every core.
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks_per_machine))
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, init_method=init_method, timeout=TIMEOUT, **rank)
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(ranks_per_machine)
    else:
        # Detectron2 0.6 makes it only inside launch().
        for first in range(0, dist.get_world_size(), ranks_per_machine):
            group = dist.new_group(list(range(first, first + ranks_per_machine)))
            if first <= dist.get_rank() < first + ranks_per_machine:
                comm._LOCAL_PROCESS_GROUP = group
    comm.synchronize()


def _check_numbers(
    args: argparse.Namespace, environment: dict[str, str] | None, *, cuda: bool
) -> None:
    """Raise for numbers of processes that contradict one another."""
    asked = f"--num-gpus is {args.num_gpus} and --num-machines {args.num_machines}"
    if args.num_gpus < 0 or args.num_machines < 1 or args.num_gpus < 1 < args.num_machines:
        raise ValueError(
            f"{asked}; expected at least one process on each of one or more machines. With "
            "MODEL.DEVICE cpu as well, --num-gpus is the number of processes on this machine."
        )
    processes = args.num_gpus * args.num_machines
    if environment is not None:
        size = int(environment["WORLD_SIZE"])
        # 1 is the default.
        if processes not in (0, 1, size):
            raise ValueError(
                f"{asked}, {processes} processes, but this process is one of {size} that torchrun "
                "or srun started (RANK or SLURM_PROCID is set in the environment). Expected no "
                f"--num-gpus, or {size} processes in all. Change the number that the launcher "
                "starts, or unset RANK and SLURM_PROCID to start the processes here."
            )
    elif cuda and processes > 1 and args.num_gpus > torch.cuda.device_count():
        raise ValueError(
            f"{asked}, but this machine has {torch.cuda.device_count()} GPUs; expected at most "
            "that many for --num-gpus."
        )


def _rank_from_environment() -> dict[str, str] | None:
    """The variables of torchrun, or SLURM's under their names; None outside both.

    SLURM's are those of the step: submitit's TorchDistributedEnvironment reads the job's, which
    are others in an interactive step and in a step smaller than its job.
    """
    env = os.environ
    if "RANK" in env:
        missing = [name for name in _VARIABLES if name not in env]
        if missing:
            raise ValueError(
                f"RANK is set in the environment, but {missing} are not; expected all variables "
                "of torchrun. Start with torchrun, set them, or unset RANK for one process."
            )
        return {name: env[name] for name in ("RANK", *_VARIABLES)}
    # An allocation without srun and an interactive step are one process, but SLURM_NTASKS is the
    # job's. Old SLURM has no other variable.
    tasks = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1")
    if int(tasks) > 1 and "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        per_node = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", tasks))
        return {
            "RANK": env["SLURM_PROCID"],
            "WORLD_SIZE": tasks,
            "LOCAL_RANK": env["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": per_node.group() if per_node else "1",
            "MASTER_ADDR": env.get("MASTER_ADDR") or _first_host(env),
            # Another port for each job: two may share a machine.
            "MASTER_PORT": env.get("MASTER_PORT")
            or str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000),
        }
    return None


def _first_host(env: Any) -> str:
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    if "[" not in hosts:
        return str(hosts.split(",")[0])
    listing = subprocess.run(
        ["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True
    )
    return listing.stdout.split()[0]


def _free_url(args: argparse.Namespace) -> str:
    """``--dist-url auto`` takes a free port, as in Detectron2."""
    if args.dist_url != "auto":
        return str(args.dist_url)
    if args.num_machines > 1:
        raise ValueError(
            f"--dist-url is auto and --num-machines {args.num_machines}; expected tcp://HOST:PORT "
            "of the first machine, the same on all."
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


# Errors whose message is clear without the type's name.
_SELF_EXPLANATORY = (ValueError, RuntimeError, OSError, FloatingPointError)


class StartUpError(Exception):
    """An error before the first step, or a diverged training; its traceback is in the log file."""


@contextlib.contextmanager
def start_up(kind: type[Exception] = Exception) -> Iterator[None]:
    """Inside, an error of a kind becomes a :class:`StartUpError` with its message.

    Before there is a log file for the traceback, this holds only for errors in values and files.
    """
    try:
        yield
    except kind as error:
        logs = _log_files()
        explained = isinstance(error, _SELF_EXPLANATORY)
        if not logs and not explained:
            raise
        message = without_queries(str(error))
        record = logger.makeRecord(
            logger.name, logging.ERROR, __file__, 0, "%s", (message,), sys.exc_info()
        )
        record.exc_text = without_queries(traceback.format_exc())
        for handler in logs:
            handler.handle(record)
        text = message
        if not explained:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {message} ({place.filename}, line {place.lineno})"
        raise StartUpError(text) from None


@contextlib.contextmanager
def with_one_line_errors() -> Iterator[None]:
    """Print a :class:`StartUpError` of this process or of a spawned one as one line, and exit.

    Raises:
        SystemExit: with status 1.
    """
    mark = f"{StartUpError.__module__}.{StartUpError.__qualname__}: "
    try:
        yield
    except StartUpError as error:
        message = str(error)
    except ProcessRaisedException as error:
        _, found, message = str(error).rpartition(mark)
        if not found:
            raise
    else:
        return
    sys.stdout.flush()
    sys.stderr.write(f"ERROR: {message.strip()}\n")
    raise SystemExit(1)


def _log_files() -> list[logging.Handler]:
    return [
        handler
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler)
        and handler.stream not in (sys.stdout, sys.stderr)
    ]
