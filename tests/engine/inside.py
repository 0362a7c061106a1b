"""What tests do inside the processes they start: each is called with the rank before the run."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from ssim_kd.data.validation import json_sets
from ssim_kd.engine.train_loop import DistillStep
from ssim_kd.engine.training import Training
from ssim_kd.engine.writers import StepReport


def weights_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def record_rank(folder: str, rank: int) -> None:
    """At the end, write the hash of this rank's weights and the gradients of its last step."""
    original = Training.after_train

    def after_train(self: Any) -> None:
        model = getattr(self.model, "module", self.model)
        facts = {
            # Statistics are each rank's own, as in Detectron2.
            "parameters": hashlib.sha256(
                b"".join(p.detach().numpy().tobytes() for p in model.parameters())
            ).hexdigest(),
            "adapters": {n: float(p.grad.norm()) for n, p in model.distillers.named_parameters()},
        }
        Path(folder, f"rank{rank}.json").write_text(json.dumps(facts))
        original(self)

    Training.after_train = after_train  # type: ignore[method-assign]


def record_steps(folder: str, rank: int) -> None:
    """Append a line a step: its iteration, images, losses and learning rates, bit for bit."""
    step, read = DistillStep.run_step, StepReport.read
    last: list[StepReport] = []
    path = os.path.join(folder, f"steps_rank{rank}.jsonl")

    def reading(self: StepReport) -> None:
        read(self)
        last[:] = [self]

    def stepping(self: DistillStep) -> None:
        step(self)
        line = {
            "iteration": last[0].iteration,
            "images": last[0].images,
            "values": {name: value.hex() for name, value in last[0].values.items()},
            "lr": [group["lr"] for group in self.optimizer.param_groups],
        }
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")

    StepReport.read = reading  # type: ignore[method-assign]
    DistillStep.run_step = stepping  # type: ignore[method-assign]


def record_reads(folder: str, rank: int) -> None:
    """Append a line for each annotation file that is read."""
    read = json_sets.read_instances

    def reading(where: str, json_file: str, **options: Any) -> Any:
        with open(os.path.join(folder, "reads.txt"), "a") as file:
            file.write(f"rank {rank}: {os.path.basename(json_file)}\n")
        return read(where, json_file, **options)

    json_sets.read_instances = reading


def distillation_gradient(cfg: Any, weights: str, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of only loss_distill for a batch (N, 3, H, W); under DDP if there is one."""
    from detectron2.structures import Boxes, Instances

    torch.manual_seed(0)
    model = build_model(cfg)
    state = torch.load(weights)
    # Saved with the adapters of the SSIM distiller, which every one starts from.
    own = f"distillers.{cfg.MODEL.DISTILL.LOSS}."
    model.load_state_dict({k.replace("distillers.ssim.", own): v for k, v in state.items()})
    model.train()
    batch = []
    for image in images:
        instances = Instances(tuple(image.shape[1:]))
        instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 56.0, 56.0]]))
        instances.gt_classes = torch.tensor([1])
        batch.append({"image": image, "instances": instances})
    parallel = DistributedDataParallel(model) if dist.is_initialized() else model
    with EventStorage(0):
        losses = parallel(batch)
    # The other losses keep their place in the graph, for DDP, and have no gradient.
    sum(v if k == "loss_distill" else v * 0 for k, v in losses.items()).backward()  # type: ignore
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def gradient_of_half(cfgs: list[Any], weights: str, images: torch.Tensor, to: str, rank: int):
    """Instead of a run: the gradients under DDP of this rank's half of a batch."""
    dist.init_process_group("gloo")
    half = images.chunk(2)[rank]
    found = [distillation_gradient(cfg, weights, half) for cfg in cfgs]
    if rank == 0:
        torch.save(found, to)
    dist.barrier()
    os._exit(0)


def fail_at(iteration: int, rank_that_fails: int, rank: int) -> None:
    """Raise in one rank's step."""
    step = DistillStep.run_step

    def failing(self: DistillStep) -> None:
        if self.iter == iteration and rank == rank_that_fails:
            raise RuntimeError("injected failure")
        step(self)

    DistillStep.run_step = failing  # type: ignore[method-assign]


def slow_writes(seconds: float, rank: int) -> None:
    """Every file takes so long to reach the disk."""
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(seconds)
        fsync(descriptor)

    os.fsync = slow


def slow_evaluation(method: str, rank_that_is_slow: int, rank: int) -> None:
    """A method of the evaluator takes a minute."""
    from detectron2.evaluation import COCOEvaluator

    from ssim_kd.engine.coco_evaluation import ScoredCOCOEvaluator

    def slow(*_: Any, **__: Any) -> None:
        print(f"COCOEvaluator.{method}", flush=True)
        time.sleep(60)

    if rank == rank_that_is_slow:
        for kind in (COCOEvaluator, ScoredCOCOEvaluator):
            setattr(kind, method, slow)


def execute(program: str, rank: int) -> None:
    """Run a program instead of a training."""
    exec(program, {})


def all_of(functions: list[Any], rank: int) -> None:
    for function in functions:
        function(rank)


def hide_from(path: str, rank_that_misses_it: int, rank: int) -> None:
    """A file that one rank does not see, as on a disk that is not mounted on one machine."""
    if rank == rank_that_misses_it:
        isfile = os.path.isfile
        os.path.isfile = lambda p: str(p) != path and isfile(p)  # type: ignore[assignment]


def put_in(fault: str, model: Any) -> Any:
    """Put NaN into a model until the handle that is returned is removed."""
    nan = float("nan")

    def levels(chosen: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: dict[str, torch.Tensor]) -> Any:
            return {k: v * nan if k in (chosen, chosen or k) else v for k, v in output.items()}

        return hook

    def loss(name: str) -> Any:
        return lambda _module, _inputs, output: {**output, name: output[name] * nan}

    if fault == "a level of the student":
        return model.student.backbone.register_forward_hook(levels("p4"), prepend=True)
    if fault == "all of the student":
        return model.student.backbone.register_forward_hook(levels(""), prepend=True)
    if fault == "a level of the teacher":
        return model.load_teacher().backbone.register_forward_hook(levels("p3"), prepend=True)
    if fault == "a loss":
        return model.student.register_forward_hook(loss("loss_cls"))
    if fault == "the distillation":
        (distiller,) = model.distillers.values()
        return distiller.register_forward_hook(lambda _m, _i, output: (output[0] * nan, output[1]))
    if fault == "a gradient":
        return next(model.student.parameters()).register_hook(lambda gradient: gradient * nan)
    raise ValueError(fault)


def put_in_at(fault: str, iteration: int, rank_of_it: int, rank: int) -> None:
    """Put NaN into one step of one rank."""
    step = DistillStep.run_step

    def run_step(self: DistillStep) -> None:
        if self.iter != iteration or rank != rank_of_it:
            return step(self)
        handle = put_in(fault, getattr(self.model, "module", self.model))
        try:
            return step(self)
        finally:
            handle.remove()

    DistillStep.run_step = run_step  # type: ignore[method-assign]


def limit_file_size(limit: int, rank: int) -> None:
    """Files of this process may have so many bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
