"""``ssim-kd compare``: runs a study."""

import argparse
import logging
import signal
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from detectron2.modeling import build_model

from ..command_line import argument_parser
from ..data import check_datasets, register_datasets
from ..engine import load_config
from ..modeling import teacher_source
from ..projects import add_project_configs
from .records import Records
from .report import write_report
from .study import TEACHER, Run, Study, read_study

if TYPE_CHECKING:
    from .running import Place


def main(args: argparse.Namespace) -> int:
    """Run a study; returns the exit status. The arguments are those of ``ssim-kd compare``."""
    # The trainings are then asked to save before this ends. A shell that starts this in the
    # background has SIGINT ignored, by the trainings too.
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        return _run(args)
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again to continue.", file=sys.stderr)
        return 130
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        study = read_study(args.study)
        _check_names(args, study)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    records = Records(args.records or args.study.parent / "results" / f"{study.name}.json")
    status, stages = 0, args.stages or [*study.content["stages"]]
    if not args.report:
        # Only trainings need submitit and Optuna.
        from .running import Place, TrainingError, build_executor, finish
        from .tuning import tune

        output = (args.output or args.study.parent / "output" / study.name).resolve()
        place = Place(
            output,
            build_executor(
                args.cluster,
                output / "jobs",
                args.workers,
                dict(pair.split("=", 1) for pair in args.submitit),
            ),
            0 if args.cluster == "slurm" else args.workers,
            dict(zip(args.opts[::2], args.opts[1::2], strict=True)),
            study.content["small_box"],
        )
        try:
            # Of weights that are to be tuned, any will do.
            weights = {**dict.fromkeys(study.content["arms"], 1.0), **records.tuned}
            asked = [run for name in stages for run in _asked(study, name, weights, args)]
            if records.missing(asked):
                _check_trainings([*study.models.values(), *asked], study.models, place)
            # All stages at once, as far as no weight has to be tuned in between.
            runs: dict[str, Run] = {}
            for name in stages:
                wanted = [arm for arm in study.to_be_tuned(name) if arm in (args.arms or [arm])]
                if not records.tuned.keys() >= set(wanted):
                    finish([*runs.values()], study.models, records, place)
                    tune(study, wanted, records, place)
                runs |= {run.key: run for run in _asked(study, name, records.tuned, args)}
            finish([*runs.values()], study.models, records, place)
        except (OSError, ValueError) as error:
            print(f"{args.study}: {error}", file=sys.stderr)
            return 2
        except TrainingError as error:
            print(f"\n{error}", file=sys.stderr)
            status = 1
    write_report(study, records, args.docs)
    return status


def _asked(
    study: Study, stage: str, weights: Mapping[str, float], args: argparse.Namespace
) -> list[Run]:
    """The trainings of a stage, of the arms and seeds of the command line."""
    runs = [run for by_slot in study.stage(stage, weights).values() for run in by_slot.values()]
    arms, seeds = args.arms, args.seeds
    return [r for r in runs if r.arm in (arms or [r.arm]) and r.seed in (seeds or [r.seed])]


def _check_names(args: argparse.Namespace, study: Study) -> None:
    stages = study.content["stages"]
    seeds = {seed for stage in stages for _, seed in study.slots(stage)}
    arms = {arm for stage in stages.values() for arm in stage["arms"]}
    known = {"stages": stages, "arms": arms, "seeds": seeds}
    for flag, names in known.items():
        unknown = sorted(set(getattr(args, flag) or ()) - set(names))
        if unknown:
            raise ValueError(
                f"--{flag} is {unknown}, which no stage of {args.study} has; expected "
                f"{sorted(names)}."
            )
    if len(args.opts) % 2 or not all("=" in pair for pair in args.submitit):
        raise ValueError(
            f"--opts {args.opts} --submitit {args.submitit}: expected KEY VALUE, NAME=VALUE."
        )


def _check_trainings(runs: Iterable[Run], models: Mapping[str, Run], place: "Place") -> None:
    """Read the config of each training as it will, check its data and build its model.

    Seeds of an arm are the same training here; one by a script is the script's.

    Raises:
        ValueError: naming the training.
    """
    from .running import overrides

    checked = set()
    for run in runs:
        opts = {**overrides(run, models, place), "SEED": 0, "OUTPUT_DIR": "unused"}
        command = ["--config-file", str(run.config), *(str(x) for kv in opts.items() for x in kv)]
        if run.script or str(command) in checked:
            continue
        checked.add(str(command))
        try:
            cfg = load_config(argument_parser().parse_args(command), add_project_configs)
            if str(cfg.DATASETS) not in checked:
                register_datasets(cfg)
                check_datasets(cfg, train=True)
                checked.add(str(cfg.DATASETS))
            if opts.get(TEACHER) and not run.teacher:
                teacher_source(cfg)  # what the study trains is not there yet
            build_model(cfg)
        except Exception as error:
            raise ValueError(f"{run.key}: {error}") from error
