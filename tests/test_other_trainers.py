"""DistilledDetector in the trainers that Detectron2's users have: nothing of ours but five lines.

Each script below is what Detectron2's tools do, in short: a DefaultTrainer with ``hooks`` and
``test``, a plain loop, and a LazyConfig with SimpleTrainer.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultPredictor, DefaultTrainer, SimpleTrainer, hooks
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.events import EventStorage, JSONWriter
from torch.nn.parallel import DistributedDataParallel

from ssim_kd import DistilledDetector, FrozenTeacher, SSIMDistiller, add_distill_config
from ssim_kd.data import register_digits
from tests.engine.runs import World, free_port
from tests.helpers import STUDENT_FPN, build, make_batch, save_weights, stock_config


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def user_config(world: World, folder: Path, *opts: Any) -> CfgNode:
    """What a user's own setup() does, with one line of ours."""
    cfg = get_cfg()
    add_distill_config(cfg)
    cfg.merge_from_file(str(world.config))
    cfg.merge_from_list(
        [
            *("OUTPUT_DIR", str(folder), "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,)),
            *("SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 0, *opts),
        ]
    )
    cfg.freeze()
    register_digits(cfg)  # the data of this test
    return cfg


def stock_student(cfg: CfgNode) -> CfgNode:
    """The same config as a user of stock Detectron2 has it."""
    stock = get_cfg()
    add_distill_config(stock)  # its keys are ignored
    stock.merge_from_other_cfg(cfg)
    stock.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    return stock


class UserTrainer(DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg: CfgNode, name: str) -> COCOEvaluator:
        return COCOEvaluator(name, output_dir=cfg.OUTPUT_DIR, use_fast_impl=False)


def start_weights(cfg: CfgNode, folder: Path, kind: str) -> str:
    """An ImageNet backbone as the zoo's .pkl, or a detector in the zoo's format."""
    student = build_model(stock_student(cfg))
    state = {k: v.numpy() for k, v in student.state_dict().items()}
    path = folder / f"{kind}.pkl"
    if kind == "imagenet":
        start = "backbone.bottom_up."
        state = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    content = {"model": state, "__author__": "test", "matching_heuristics": kind == "imagenet"}
    path.write_bytes(pickle.dumps(content))
    return str(path)


@pytest.mark.parametrize("kind", ["imagenet", "detector"])
def test_default_trainer_loads_start_weights(kind, world, tmp_path, caplog) -> None:
    cfg = user_config(world, tmp_path)
    cfg = user_config(world, tmp_path, "MODEL.WEIGHTS", start_weights(cfg, tmp_path, kind))
    trainer = UserTrainer(cfg)
    caplog.clear()
    trainer.resume_or_load(resume=False)
    expected = pickle.loads(Path(cfg.MODEL.WEIGHTS).read_bytes())["model"]
    start = "backbone.bottom_up." if kind == "imagenet" else ""
    found = trainer.model.student.state_dict()
    for name, value in expected.items():
        assert torch.equal(found[start + name], torch.as_tensor(value)), name
    if kind == "detector":
        assert "not found in the checkpoint" not in caplog.text
    assert "not used by the model" not in caplog.text


def test_default_trainer_trains_resumes_and_leaves_a_stock_student(world, tmp_path, caplog) -> None:
    cfg = user_config(world, tmp_path)
    trainer = UserTrainer(cfg)
    trainer.model.log_period = 1
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert "bbox" in trainer._last_eval_results
    lines = [json.loads(x) for x in (tmp_path / "metrics.json").read_text().splitlines()]
    logged = set().union(*lines)
    assert {"loss_distill", "distill/ssim_p2", "distill/ssim_p2_weighted"} <= logged

    # The checkpoint is a plain student, with the distillers next to it.
    saved = torch.load(tmp_path / "model_final.pth", weights_only=False)
    stock = build_model(stock_student(cfg))
    result = stock.load_state_dict(saved["model"], strict=False)
    assert not result.missing_keys
    assert {key.split(".")[0] for key in result.unexpected_keys} == {"distillers"}
    caplog.clear()
    DetectionCheckpointer(stock).load(str(tmp_path / "model_final.pth"))
    assert "not found in the checkpoint" not in caplog.text

    # Resume: weights, adapters, iteration.
    again = UserTrainer(user_config(world, tmp_path, "SOLVER.MAX_ITER", 3))
    caplog.clear()
    again.resume_or_load(resume=True)
    assert again.start_iter == 2
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, saved["model"][name]), name
    assert "not found" not in caplog.text and "not used" not in caplog.text
    again.train()
    moved = torch.load(tmp_path / "model_final.pth", weights_only=False)["model"]
    key = "distillers.ssim.adapters.p3.weight"
    assert not torch.equal(moved[key], saved["model"][key])


def test_evaluation_and_predictor_load_no_teacher(world, tmp_path) -> None:
    cfg = user_config(world, tmp_path)
    student = save_weights(stock_student(cfg), tmp_path / "student.pth")
    # Neither the weights nor the config of the teacher are on this machine.
    for opts in (
        ("MODEL.DISTILL.TEACHER.WEIGHTS", "/nowhere/teacher.pth"),
        ("MODEL.DISTILL.TEACHER.NAME", "/nowhere/teacher.yaml"),
    ):
        there = user_config(world, tmp_path, "MODEL.WEIGHTS", str(student), *opts)
        image = make_batch(((96, 128),))[0]["image"].permute(1, 2, 0).numpy()
        found = DefaultPredictor(there)(image)["instances"]
        expected = DefaultPredictor(
            user_config(
                world, tmp_path, "MODEL.WEIGHTS", str(student), "MODEL.DISTILL.ENABLED", False
            )
        )(image)["instances"]
        assert torch.equal(found.scores, expected.scores)
        model = build_model(there)
        with pytest.raises(ValueError, match=r"MODEL\.DISTILL\.TEACHER\."), EventStorage(0):
            model.train()(make_batch())


def test_test_time_augmentation_takes_the_wrapper(world, tmp_path) -> None:
    cfg = user_config(world, tmp_path, "TEST.AUG.MIN_SIZES", (64,), "TEST.AUG.FLIP", False)
    model = build_model(cfg).eval()
    plain = GeneralizedRCNNWithTTA(cfg, model.student)
    wrapped = GeneralizedRCNNWithTTA(cfg, model)
    inputs = [{k: v for k, v in x.items() if k != "instances"} for x in make_batch(((96, 96),))]
    with torch.no_grad():
        found, expected = wrapped(inputs), plain(inputs)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["instances"].scores, other["instances"].scores)


def plain_loop(cfg: CfgNode, model: torch.nn.Module, folder: Path, *, resume: bool = False) -> None:
    """The loop of plain_train_net.py: no trainer, no hooks."""
    model.train()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    checkpointer = DetectionCheckpointer(
        model, str(folder), optimizer=optimizer, scheduler=scheduler
    )
    start = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume).get("iteration", -1) + 1
    periodic = PeriodicCheckpointer(checkpointer, 1, max_iter=cfg.SOLVER.MAX_ITER)
    writer = JSONWriter(str(folder / "metrics.json"))
    loader = build_detection_train_loader(cfg)
    with EventStorage(start) as storage:
        for data, iteration in zip(loader, range(start, cfg.SOLVER.MAX_ITER), strict=False):
            storage.iter = iteration
            losses = model(data)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            scheduler.step()
            storage.put_scalars(**{k: float(v) for k, v in losses.items()})
            writer.write()
            periodic.step(iteration)


def test_plain_loop_trains_and_resumes(world, tmp_path) -> None:
    cfg = user_config(world, tmp_path)
    model = build_model(cfg)
    model.log_period = 2
    plain_loop(cfg, model, tmp_path)
    lines = [json.loads(x) for x in (tmp_path / "metrics.json").read_text().splitlines()]
    assert ["distill/ssim_p2" in line for line in lines] == [False, True]
    again = build_model(user_config(world, tmp_path, "SOLVER.MAX_ITER", 3))
    longer = user_config(world, tmp_path, "SOLVER.MAX_ITER", 3)
    plain_loop(longer, again, tmp_path, resume=True)
    saved = torch.load(tmp_path / "model_final.pth", weights_only=False)
    assert saved["iteration"] == 2
    momenta = [s["momentum_buffer"] for s in saved["optimizer"]["state"].values()]
    assert momenta and all(torch.isfinite(m).all() for m in momenta)


def _rank_of_two(rank: int, config: str, folder: str, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    cfg = get_cfg()
    add_distill_config(cfg)
    cfg.merge_from_file(config)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = build_optimizer(cfg, ddp)
    with EventStorage(0) as storage:
        for iteration in range(2):
            storage.iter = iteration
            losses = ddp(make_batch(((64, 96),), seed=10 * iteration + rank))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.save(weights, Path(folder, f"rank{rank}.pth"))
    dist.destroy_process_group()


def test_two_processes_come_to_equal_weights(world, tmp_path) -> None:
    arguments = (str(world.config), str(tmp_path), free_port())
    # From a server that has imported everything: tests/engine/runs.py.
    mp.start_processes(_rank_of_two, nprocs=2, args=arguments, start_method="forkserver")
    first, second = (torch.load(tmp_path / f"rank{rank}.pth") for rank in (0, 1))
    assert any(name.startswith("distillers.") for name in first)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_modules_in_python_with_a_simple_trainer(tmp_path) -> None:
    """As a LazyConfig makes it: no config of ours at all."""
    student = build(stock_config("retinanet"))
    teacher = build(stock_config("faster", fpn=48), seed=1)
    model = DistilledDetector(
        student=student,
        teacher=FrozenTeacher(teacher),
        distillers=[SSIMDistiller(levels=["p3", "p4"], weight=2.0)],
        max_iter=2,
        log_period=1,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = SimpleTrainer(model, [make_batch()] * 3, optimizer)
    checkpointer = DetectionCheckpointer(model, str(tmp_path), trainer=trainer)
    trainer.register_hooks(
        [
            hooks.PeriodicCheckpointer(checkpointer, 1),
            hooks.PeriodicWriter([JSONWriter(str(tmp_path / "metrics.json"))], period=1),
        ]
    )
    trainer.train(0, 2)
    lines = [json.loads(x) for x in (tmp_path / "metrics.json").read_text().splitlines()]
    assert all("distill/ssim_p3_weighted" in line for line in lines)
    stock = build(stock_config("retinanet", fpn=STUDENT_FPN), seed=4)
    saved = torch.load(tmp_path / "model_final.pth", weights_only=False)["model"]
    assert not stock.load_state_dict(saved, strict=False).missing_keys
