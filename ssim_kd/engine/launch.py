"""From a command line to processes: one, spawned ones, or those of torchrun and SLURM."""

import argparse
import os
import re
import subprocess
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import default_argument_parser, launch
from detectron2.utils import comm

from .stopping import EXIT_STOPPED, Stopped, forward_sigterm

#: How long a process waits for another before it gives up.
TIMEOUT = timedelta(minutes=30)


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's own arguments, and ``--eval-teacher``."""
    parser = default_argument_parser()
    parser.add_argument(
        "--eval-teacher",
        action="store_true",
        help="evaluate the teacher of MODEL.DISTILL.TEACHER by itself on DATASETS.TEST",
    )
    return parser


def launch_processes(
    main: Callable[..., Any], args: argparse.Namespace, *, device: str, main_args: tuple
) -> Any:
    """Run ``main(*main_args)`` in as many processes as were asked for.

    - ``RANK`` in the environment (torchrun and the like): this process is one of them.
    - ``SLURM_NTASKS`` > 1 inside a job step: likewise.
    - else ``--num-gpus`` x ``--num-machines`` > 1: Detectron2's ``launch()``; on a CPU, so many
      processes over Gloo.

    Args:
        main: picklable.
        args: of :func:`argument_parser`.
        device: "cuda" or "cpu".
        main_args: arguments of ``main``.

    Returns:
        what ``main`` returns where it runs in this process, else None.
    """
    cuda = device.startswith("cuda")
    environment = _rank_from_environment()
    if environment is not None:
        os.environ.update(environment)
        _join(
            cuda=cuda, init_method="env://", ranks_per_machine=int(environment["LOCAL_WORLD_SIZE"])
        )
        result = main(*main_args)
        # After an exception the group is left as it is: to leave it would wait for the others.
        dist.destroy_process_group()
        return result
    processes = args.num_gpus * args.num_machines
    if processes <= 1:
        return main(*main_args)
    forward_sigterm()
    try:
        if cuda:
            launch(
                main,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=main_args,
                timeout=TIMEOUT,
            )
        else:
            url = args.dist_url if args.num_machines > 1 else _free_url(args.dist_url)
            ranks = (processes, args.num_gpus, args.machine_rank)
            mp.spawn(_cpu_worker, nprocs=args.num_gpus, args=(main, main_args, *ranks, url))
    except mp.ProcessExitedException as error:
        if error.exit_code == EXIT_STOPPED:
            raise Stopped from None
        raise
    return None


def _cpu_worker(
    local_rank: int,
    main: Callable[..., Any],
    main_args: tuple,
    world_size: int,
    per_machine: int,
    machine_rank: int,
    url: str,
) -> None:
    _join(
        cuda=False,
        init_method=url,
        ranks_per_machine=per_machine,
        world_size=world_size,
        rank=machine_rank * per_machine + local_rank,
    )
    main(*main_args)
    dist.destroy_process_group()


def _join(*, cuda: bool, init_method: str, ranks_per_machine: int, **rank: Any) -> None:
    """Join the process group, and make the group of this machine that Detectron2 relies on."""
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        # Each of the processes would otherwise take every core.
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks_per_machine))
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, init_method=init_method, timeout=TIMEOUT, **rank)
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(ranks_per_machine)
    else:
        # Detectron2 0.6 makes it inside launch() alone.
        for first in range(0, dist.get_world_size(), ranks_per_machine):
            group = dist.new_group(list(range(first, first + ranks_per_machine)))
            if first <= dist.get_rank() < first + ranks_per_machine:
                comm._LOCAL_PROCESS_GROUP = group
    comm.synchronize()


def _rank_from_environment() -> dict[str, str] | None:
    """The variables of torchrun, or their equals out of SLURM's; None outside both."""
    env = os.environ
    if "RANK" in env:
        missing = [k for k in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if k not in env]
        if missing:
            raise ValueError(f"RANK is set in the environment, but {missing} are not.")
        local = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        return {name: env.get(name, value) for name, value in local.items()}
    # In an allocation without srun, or in an interactive step, there is but this one process.
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        per_node = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_NTASKS"]))
        return {
            "RANK": env["SLURM_PROCID"],
            "WORLD_SIZE": env["SLURM_NTASKS"],
            "LOCAL_RANK": env["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": per_node.group() if per_node else "1",
            "MASTER_ADDR": env.get("MASTER_ADDR") or _first_host(env),
            # One port a job, so that jobs that share a machine do not meet.
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


def _free_url(url: str) -> str:
    """``--dist-url auto`` takes a free port, as in Detectron2."""
    if url != "auto":
        return url
    from torch.distributed.elastic.utils.distributed import get_free_port

    return f"tcp://127.0.0.1:{get_free_port()}"
