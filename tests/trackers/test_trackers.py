"""MLflow with a local store and Weights & Biases offline: what they hold is read back."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from pydoc import locate
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from PIL import Image

from ssim_kd import DistillTrainer, MLflowWriter, WandbWriter, trackers
from ssim_kd.config import write_stock_config
from ssim_kd.engine import lazy
from ssim_kd.engine.preflight import check_config
from ssim_kd.trackers.writer import parameters
from tests.documentation import fences
from tests.engine.runs import ROOT, World, log, metrics

mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")

from wandb.proto.wandb_internal_pb2 import Record  # noqa: E402

BOTH = ("TRACKING.WRITERS", "('mlflow', 'wandb')", "TRACKING.PROJECT", "digits")


#: The code of the documentation's page.
BLOCKS = fences(ROOT / "docs/trackers.md", "python")
PLAIN = (*BOTH, "MODEL.DISTILL.ENABLED", "False")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[Path]:
    """One MLflow store for all: to make its tables takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        yield folder


def runs_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / trackers.TRACKED_RUNS).read_text())


def in_mlflow(folder: Path) -> Any:
    """The run of a folder, with the history of each metric as {iteration: value}."""
    client = mlflow.tracking.MlflowClient()
    run = client.get_run(runs_of(folder)["mlflow"])
    history = {
        name: {m.step: m.value for m in client.get_metric_history(run.info.run_id, name)}
        for name in run.data.metrics
    }
    pictures = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    return run, history, pictures


def in_wandb(folder: Path) -> list[Any]:
    """The records of all files of a folder's run, oldest first."""
    files = sorted(folder.glob(f"wandb/offline-run-*/run-{runs_of(folder)['wandb']}.wandb"))
    return [record for file in files for record in records(file.read_bytes())]


def records(data: bytes) -> Iterator[Any]:
    """LevelDB's log format: blocks of 32 KiB; each piece has checksum, length and type."""
    place, parts = 7, b""  # after the file's header
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, last
            yield Record.FromString(parts)
            parts = b""


def history_in_wandb(folder: Path) -> dict[str, dict[int, Any]]:
    """The history of each metric as {iteration: value}; pictures and histograms are dicts."""
    found: dict[str, dict[int, Any]] = {}
    for record in in_wandb(folder):
        if record.HasField("history"):
            for item in record.history.item:
                name, *inner = item.nested_key or [item.key]
                values, step = found.setdefault(name, {}), record.history.step.num
                value = json.loads(item.value_json)
                values[step] = {**values.get(step, {}), inner[0]: value} if inner else value
    return found


class StopAt(HookBase):
    def __init__(self, iteration: int, error: type[Exception] | None = None) -> None:
        self.iteration, self.error = iteration, error

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            if self.error:
                raise self.error("injected failure")
            self.trainer.stop_requested = True


def trainer_with(hook: HookBase) -> type[DistillTrainer]:
    class Trainer(DistillTrainer):
        def build_hooks(self) -> list[Any]:
            return [hook, *super().build_hooks()]

    return Trainer


def test_training_is_tracked_over_a_stop_and_a_resume(
    world: World, store: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run7"
    options = (*BOTH, "VIS_PERIOD", 3)
    with pytest.raises(SystemExit) as ended:
        world.main(folder, *options, trainer=trainer_with(StopAt(3)))
    assert ended.value.code == 143
    first = runs_of(folder)
    run, history, _ = in_mlflow(folder)
    assert run.info.status == "KILLED" and run.info.run_name == "run7"
    assert list(history["total_loss"]) == [3]
    exits = [r.exit.exit_code for r in in_wandb(folder) if r.HasField("exit")]
    assert exits == [143]

    # Also with another config: MLflow's parameters cannot change.
    world.main(folder, "--resume", *options, "SOLVER.CHECKPOINT_PERIOD", 2)
    assert runs_of(folder) == first
    run, history, pictures = in_mlflow(folder)
    experiment = mlflow.tracking.MlflowClient().get_experiment(run.info.experiment_id)
    assert experiment.name == "digits" and run.info.status == "FINISHED"
    assert run.data.params["SOLVER.CHECKPOINT_PERIOD"] == "3"
    assert run.data.params["MODEL.DISTILL.NAME"] == "SSIMDistiller"
    assert any(path.startswith("images/distill~p3+step+2") for path in pictures)
    assert any(path.startswith("images/distill~p3+step+5") for path in pictures)

    ours = history_in_wandb(folder)
    (config,) = (
        {item.key: item.value_json for item in record.run.config.update}
        for record in in_wandb(folder)
        if record.HasField("run") and "MODEL.DISTILL.NAME" in str(record.run.config)
    )
    assert config["MODEL.DISTILL.NAME"] == '"SSIMDistiller"' and config["SOLVER.MAX_ITER"] == "6"
    assert {record.run.project for record in in_wandb(folder) if record.HasField("run")} == {
        "digits"
    }
    assert {*ours["distill/p3"]} == {2, 5}

    logged = metrics(folder)
    assert len(logged) >= 3 and any("bbox/AP" in line for line in logged)
    for line in logged:
        iteration = line.pop("iteration")
        line.pop("eta_seconds", None)  # of the writer that prints
        for name, value in line.items():
            assert history[name][iteration] == pytest.approx(value, nan_ok=True), name
            found = float(ours[name][iteration])
            assert found == pytest.approx(value, nan_ok=True), name


def test_training_starts_anew_in_a_run_of_its_own(world: World, store: Path, tmp_path) -> None:
    options = (*PLAIN, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()", "DATASETS.TEST", "()")
    world.main(tmp_path, *options)
    first = runs_of(tmp_path)
    # Nothing is left to go on from.
    for file in (*tmp_path.glob("*.pth"), tmp_path / "last_checkpoint"):
        file.unlink()
    world.main(tmp_path, "--resume", *options)
    second = runs_of(tmp_path)
    assert first.keys() == second.keys() == {"mlflow", "wandb"}
    assert first["mlflow"] != second["mlflow"] and first["wandb"] != second["wandb"]


@pytest.mark.parametrize("place", ["a step", "the last evaluation"])
def test_training_that_fails_is_a_failed_run(
    place, world: World, store: Path, tmp_path, monkeypatch
) -> None:
    trainer = trainer_with(StopAt(2, RuntimeError if place == "a step" else None))
    if place != "a step":
        trainer = DistillTrainer

        def fail(*_args: Any) -> None:
            raise RuntimeError("injected failure")

        monkeypatch.setattr(DistillTrainer, "test", classmethod(fail))
    with pytest.raises(RuntimeError, match="injected failure"):
        world.main(tmp_path, *PLAIN, trainer=trainer)
    run, history, _ = in_mlflow(tmp_path)
    assert run.info.status == "FAILED"
    assert list(history["total_loss"]) == [1 if place == "a step" else 5]
    assert [r.exit.exit_code for r in in_wandb(tmp_path) if r.HasField("exit")] == [1]


def test_tracker_that_fails_costs_nothing_but_itself(
    world: World, store: Path, tmp_path, monkeypatch
) -> None:
    calls: list[str] = []

    def fail(self: Any, *_args: Any, **_options: Any) -> None:
        calls.append(type(self).__name__)
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(MLflowWriter, "_log", fail)
    monkeypatch.setattr(WandbWriter, "_log", fail)
    world.main(tmp_path, *PLAIN, "DATASETS.TEST", "()")
    assert metrics(tmp_path)[-1]["iteration"] == 5 and (tmp_path / "model_final.pth").is_file()
    assert sorted(calls) == ["MLflowWriter", "WandbWriter"]
    assert log(tmp_path).count("ConnectionError: the server is gone") == 2
    assert in_mlflow(tmp_path)[0].info.status == "FINISHED"


@pytest.mark.parametrize(
    ("variables", "tracker"),
    [
        ({"MLFLOW_TRACKING_URI": "sqlite:///{empty}/log.txt"}, "mlflow"),
        ({"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "mlflow"),
        ({"WANDB_MODE": "online", "HOME": "{empty}", "NETRC": "{empty}/netrc"}, "wandb"),
    ],
)
def test_tracker_that_is_not_reachable_stops_before_the_first_step(
    variables, tracker, world: World, store: Path, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(empty=tmp_path))
    wandb.teardown()  # it reads its variables once
    with pytest.raises(ValueError, match=rf"TRACKING\.WRITERS .*'{tracker}'"):
        world.main(tmp_path, "TRACKING.WRITERS", f"('{tracker}',)")
    wandb.teardown()
    assert not (tmp_path / "metrics.json").read_text()


def test_run_of_the_folder_that_is_gone(store: Path, tmp_path) -> None:
    (tmp_path / trackers.TRACKED_RUNS).write_text('{"mlflow": "0123456789abcdef"}')
    with pytest.raises(ValueError, match=rf"'0123456789abcdef' of .*{trackers.TRACKED_RUNS}"):
        MLflowWriter(folder=str(tmp_path)).start(resume=True)


def test_check_trackers(world: World, tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"TRACKING\.WRITERS .*'mlflo'.*\['mlflow', 'wandb'\]"):
        world.cfg(tmp_path, "TRACKING.WRITERS", "('mlflo',)")
    cfg = world.cfg(tmp_path, *BOTH)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_config(cfg, evaluate=True)
    for check in (lambda: check_config(cfg, evaluate=False), lambda: MLflowWriter(cfg)):
        with pytest.raises(ValueError, match=r"pip install 'ssim_kd\[mlflow\]'"):
            check()


def test_write_pictures_histograms_and_names(store: Path, tmp_path) -> None:
    """Without TensorBoard's writer, which clears them, nothing is handed over twice."""
    writers = [
        MLflowWriter(folder=str(tmp_path), params={"a": {"b": (1, 2)}, "c": None}),
        WandbWriter(folder=str(tmp_path)),
    ]
    picture = np.zeros((3, 4, 6), dtype=np.uint8)
    picture[1, 2, 3] = 255
    with EventStorage(0) as storage:
        storage.put_image("uint8", picture)
        storage.put_image("float", torch.from_numpy(picture).float() / 255)
        storage.put_histogram("weights", torch.tensor([0.0, 0.1, 0.9, 1.0]), bins=2)
        others = {"bbox/AP-box (big) & é": 3.0, "nan": float("nan")}
        storage.put_scalars(total_loss=1.0, smoothing_hint=False, **others)
        for writer in writers:
            writer.write()
            writer.write()
        storage.iter = 7
        storage.put_scalar("total_loss", 2.0, smoothing_hint=False)
        for writer in writers:
            writer.write()
            writer.close()
            writer.close()
    run, history, pictures = in_mlflow(tmp_path)
    assert run.data.params == {"a.b": "(1, 2)", "c": "None"}
    assert history["total_loss"] == {0: 1.0, 7: 2.0}
    assert history["bbox/AP-box _big_ _ é"] == {0: 3.0} and np.isnan(history["nan"][0])
    png = [path for path in pictures if path.endswith(".png")]
    assert len(png) == 2
    for path in png:
        local = mlflow.tracking.MlflowClient().download_artifacts(run.info.run_id, path)
        shown = np.asarray(Image.open(local))
        assert np.array_equal(shown.transpose(2, 0, 1), picture)
    ours = history_in_wandb(tmp_path)
    assert ours["total_loss"] == {0: 1.0, 7: 2.0} and ours["bbox/AP-box (big) & é"] == {0: 3.0}
    assert ours["weights"][0]["_type"] == "histogram" and ours["weights"][0]["values"] == [2, 2]
    assert ours["weights"][0]["bins"] == [0.0, 0.5, 1.0]
    assert ours["uint8"][0]["_type"] == "image-file" and list(ours["uint8"]) == [0]


def test_default_trainer_with_a_tracker(world: World, store: Path, tmp_path, caplog) -> None:
    names: dict[str, Any] = {"DefaultTrainer": DefaultTrainer}
    exec(BLOCKS[0], names)
    cfg = world.cfg(tmp_path, "SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1)
    cfg.defrost()
    cfg.SOLVER.STEPS, cfg.DATASETS.TEST = (), ()
    from ssim_kd.data import register_datasets

    register_datasets(cfg)
    trainer = names["Trainer"](cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    first = runs_of(tmp_path)
    cfg.SOLVER.MAX_ITER = 3
    trainer = names["Trainer"](cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    assert runs_of(tmp_path) == first
    run, history, _ = in_mlflow(tmp_path)
    assert run.info.status == "FINISHED" and {*history["total_loss"]} == {1, 2}


def test_stock_config_has_no_tracker(world: World, tmp_path) -> None:
    write_stock_config(world.cfg(tmp_path, *BOTH), str(tmp_path / "student.yaml"))
    assert "TRACKING" not in (tmp_path / "student.yaml").read_text()


def test_lazy_config_with_a_tracker(tmp_path) -> None:
    train = {"output_dir": str(tmp_path), "max_iter": 1}
    cfg = OmegaConf.create({"train": train, "model": LazyCall(torch.nn.Linear)(in_features=3)})
    exec(BLOCKS[1], {"L": LazyCall, "WandbWriter": WandbWriter, "train": cfg.train})
    (tracker,) = lazy.build_trackers(cfg)
    assert isinstance(tracker, WandbWriter)
    assert tracker.folder == str(tmp_path) and tracker.project == "parts"
    params = parameters(tracker.params)
    assert params["model.in_features"] == 3 and params["train.max_iter"] == 1
    tracker.close()


def log_once(writer: Any, iteration: int, **scalars: float) -> None:
    with EventStorage(iteration) as storage:
        storage.put_scalars(smoothing_hint=False, **scalars)
        writer.write()
        writer.close()


@pytest.mark.parametrize("way", ["project", "set_experiment", "id", "name", "run", "active"])
def test_mlflow_run_and_experiment_are_those_of_mlflow(
    way: str, store: Path, tmp_path, monkeypatch
) -> None:
    client, name = mlflow.MlflowClient(), f"by {way}"
    experiment = client.create_experiment(name)
    for variable in ("MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    writer = MLflowWriter(
        folder=str(tmp_path), project=name * (way == "project"), params={"x": 1, "y": 2}
    )
    given = None
    if way == "set_experiment":
        mlflow.set_experiment(name)
    elif way == "id":
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    elif way == "name":
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
    elif way == "run":
        given = client.create_run(experiment)
        monkeypatch.setenv("MLFLOW_RUN_ID", given.info.run_id)
    elif way == "active":
        given = mlflow.start_run(experiment_id=experiment)
        mlflow.log_param("x", "mine")
    try:
        log_once(writer, 3, total_loss=2.0)
        run, history, _ = in_mlflow(tmp_path)
        assert run.info.experiment_id == experiment and history["total_loss"] == {3: 2.0}
        assert run.data.params == {"x": "mine" if way == "active" else "1", "y": "2"}
        assert run.info.status == ("RUNNING" if way == "active" else "FINISHED")
        assert given is None or run.info.run_id == given.info.run_id
    finally:
        mlflow.end_run()
        mlflow.tracking.fluent._active_experiment_id = None  # of set_experiment


NAMES = {
    **{"a/b": "a/b", "a:b": "a_b", "a?b": "a_b-", "Other//Shoes": "Other/_/Shoes"},
    **{"Sneakers/": "Sneakers/_", "..": "_", "a/../b": "a/_/b", "x" * 300: "x" * 241 + "-"},
}


def test_mlflow_takes_any_name(store: Path, tmp_path) -> None:
    writer = MLflowWriter(folder=str(tmp_path))
    log_once(writer, 0, **dict.fromkeys(NAMES, 1.0))
    _, history, _ = in_mlflow(tmp_path)
    assert len(history) == len(NAMES)
    for name, plain in NAMES.items():
        found = writer._named(name)
        assert found in history and found.startswith(plain) and len(found) <= 250


def test_wandb_run_of_the_user_stays_open(store: Path, tmp_path) -> None:
    mine = wandb.init(project="parts", dir=str(tmp_path))
    try:
        for i in range(50):
            mine.log({"own": float(i)})
        log_once(WandbWriter(folder=str(tmp_path), params={"x": 1}), 3, total_loss=2.0)
        assert runs_of(tmp_path)["wandb"] == mine.id and wandb.run is mine
        assert mine.config["x"] == 1
        mine.log({"own": 50.0})
    finally:
        mine.finish()
        wandb.teardown()  # the file is whole then
    history = history_in_wandb(tmp_path)
    assert history["own"].keys() == {*range(50), 51}
    assert history["total_loss"] == {50: 2.0} and history["iteration"] == {50: 3}


def test_start_with_a_file_of_runs_that_is_cut(store: Path, tmp_path, caplog) -> None:
    (tmp_path / trackers.TRACKED_RUNS).write_text("")
    writer = MLflowWriter(folder=str(tmp_path))
    writer.start(resume=True)
    writer.close()
    assert trackers.TRACKED_RUNS in caplog.text and runs_of(tmp_path)["mlflow"]


def test_writers_are_found_at_their_former_place() -> None:
    """Saved LazyConfigs may name it."""
    assert locate("ssim_kd.engine.trackers.MLflowWriter") is MLflowWriter
