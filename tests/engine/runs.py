"""Runs of the command line that take a second or two: digits of 96 pixels, a tiny detector."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from ssim_kd.engine import argument_parser, load_config, main, run
from ssim_kd.projects import add_project_configs

ROOT = Path(__file__).resolve().parents[2]

#: The student; {root} is the folder of the digits.
CONFIG = """
_BASE_: {base}
MODEL:
  DEVICE: cpu
  WEIGHTS: ""
  PIXEL_STD: [57.0, 57.0, 57.0]
  BACKBONE: {{FREEZE_AT: 0}}
  RESNETS: {{WIDTH_PER_GROUP: 8, STEM_OUT_CHANNELS: 16, RES2_OUT_CHANNELS: 16, NORM: BN}}
  FPN: {{OUT_CHANNELS: {channels}, NORM: BN}}
  ANCHOR_GENERATOR: {{SIZES: [[8], [16], [32], [64], [96]]}}
  ROI_BOX_HEAD: {{FC_DIM: 64}}
  ROI_HEADS: {{NUM_CLASSES: 10, BATCH_SIZE_PER_IMAGE: 32}}
  RETINANET: {{NUM_CLASSES: 10, NUM_CONVS: 1, NORM: BN}}
  RPN:
    PRE_NMS_TOPK_TRAIN: 100
    POST_NMS_TOPK_TRAIN: 50
    PRE_NMS_TOPK_TEST: 100
    POST_NMS_TOPK_TEST: 50
  DISTILL:
    TEACHER: {{NAME: {teacher_config}, WEIGHTS: {teacher_weights}}}
DATASETS:
  TRAIN: ("digits_train",)
  TEST: ("digits_val",)
  DIGITS:
    ROOT: {root}
    IMAGE_SIZE: 96
    NUM_IMAGES: [12, 4, 4]
    DIGIT_SIZE: [14, 40]
    DIGITS_PER_IMAGE: [1, 3]
INPUT: {{MIN_SIZE_TRAIN: [96], MIN_SIZE_TEST: 96}}
SOLVER:
  IMS_PER_BATCH: 4
  BASE_LR: 0.01
  MAX_ITER: 6
  STEPS: [4]
  CHECKPOINT_PERIOD: 3
  CHECKPOINTS_TO_KEEP: 0
  WARMUP_ITERS: 2
DATALOADER: {{NUM_WORKERS: 0}}
TEST: {{REPORT: False}}
SEED: 1
VERSION: 2
"""


class World:
    """Configs, data and a teacher, made once in a separate folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = self.write("student", "COCO-Detection/Base-RCNN-FPN.yaml", channels=32)
        self.retinanet = self.write("retinanet", "COCO-Detection/Base-RetinaNet.yaml", channels=32)
        self.teacher_config = self.write(
            "teacher", "COCO-Detection/Base-RCNN-FPN.yaml", channels=48
        )
        self.teacher = folder / "teacher.pth"
        save_random_detector(self.teacher_config, self.teacher)

    def write(self, name: str, base: str, *, channels: int) -> Path:
        """Write a config whose teacher is this world's."""
        path = self.folder / f"{name}.yaml"
        path.write_text(
            CONFIG.format(
                base=ROOT / "configs" / base,
                channels=channels,
                root=self.folder / "digits",
                teacher_config=self.folder / "teacher.yaml",
                teacher_weights=self.folder / "teacher.pth",
            )
        )
        return path

    def arguments(self, folder: Path, *options: Any, config: Path | None = None) -> list[str]:
        """A command line: flags (--resume) first, then KEY VALUE."""
        flags = [str(o) for o in options if str(o).startswith("--")]
        if "--num-gpus" in flags:
            flags.insert(flags.index("--num-gpus") + 1, "2")
        rest = [str(o) for o in options if not str(o).startswith("--")]
        config = config or self.config
        return ["--config-file", str(config), *flags, "OUTPUT_DIR", str(folder), *rest]

    def cfg(self, folder: Path, *options: Any, config: Path | None = None) -> CfgNode:
        arguments = self.arguments(folder, *options, config=config)
        return load_config(argument_parser().parse_args(arguments), add_project_configs)

    def main(self, folder: Path, *options: Any, config: Path | None = None, **keywords: Any) -> Any:
        """Run in this process; keywords are main()'s."""
        arguments = self.arguments(folder, *options, config=config)
        return main(argument_parser().parse_args(arguments), add_project_configs, **keywords)


def save_random_detector(config: Path, path: Path, *, seed: int = 5) -> None:
    """Save random weights of the student's architecture in a config; statistics as if trained."""
    from detectron2.modeling import build_model

    from ssim_kd.config import student_config

    arguments = argument_parser().parse_args(["--config-file", str(config)])
    torch.manual_seed(seed)
    model = build_model(student_config(load_config(arguments, add_project_configs)))
    for name, value in model.named_buffers():
        if name.endswith("running_var"):
            value.uniform_(0.8, 1.25)
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            value.detach().normal_(0, 0.05)
    torch.save({"model": model.state_dict()}, path)


def checkpoint(folder: Path, name: str = "model_final") -> dict[str, Any]:
    found = torch.load(folder / f"{name}.pth", weights_only=True)
    found.pop("run", None)  # another for each run
    return found


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def assert_same(a: Any, b: Any, where: str = "checkpoint") -> None:
    """Two checkpoints are equal bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def free_port() -> int:
    """A port below those that the system gives out, which another process may get first."""
    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            return port


# --- real processes, forked from one that has imported everything, so that each costs little ---

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.engine.runs"])


class Child:
    """A process that runs the command line; its output is in a file."""

    def __init__(self, arguments: list[str], log: Path, env: dict[str, str], prepare: Any) -> None:
        self.log = log
        self.process = _context.Process(target=_child, args=(arguments, str(log), env, prepare))
        self.process.start()

    @property
    def pid(self) -> int:
        return int(self.process.pid or 0)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self, seconds: float = 120) -> int:
        """The exit status (negative: the signal). A process that does not end is an error."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"did not end in {seconds} s:\n{self.output[-3000:]}")
        return int(self.process.exitcode)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Wait until a text is in the output."""
        wait_until(lambda: text in self.output or not self.process.is_alive(), seconds, text)
        assert text in self.output, self.output[-3000:]


def wait_until(condition: Any, seconds: float, what: str = "") -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s: {what}")
        time.sleep(0.005)


@contextmanager
def children(
    *command_lines: list[str],
    folder: Path,
    env: dict[str, str] | None = None,
    prepare: Any = None,
    world_size: int | None = None,
) -> Iterator[list[Child]]:
    """Start a process a command line; several, or ``world_size``, are the ranks of one run.

    Args:
        command_lines: arguments of train_net.py.
        folder: of their outputs.
        env: further variables of the environment.
        prepare: picklable; called with the rank in each process before it runs.
        world_size: of the run, where not as many as the command lines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = world_size or len(command_lines)
    port = str(free_port())
    started = []
    for rank, arguments in enumerate(command_lines):
        variables = dict(env or {})
        if size > 1 and not any(name.startswith("SLURM") for name in variables):
            variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            variables |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {k: v.replace("{rank}", str(rank)) for k, v in variables.items()}
        log = folder / f"output_{len(list(folder.glob('output_*')))}.txt"
        started.append(Child(arguments, log, variables, prepare))
    try:
        yield started
    finally:
        for child in started:
            if child.process.is_alive():
                child.process.kill()
            child.process.join()


def _child(arguments: list[str], log: str, env: dict[str, str], prepare: Any) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ.update(env)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare(int(env.get("RANK", env.get("SLURM_PROCID", "0"))))
    run(argument_parser().parse_args(arguments), add_project_configs)
