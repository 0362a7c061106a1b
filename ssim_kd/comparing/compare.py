"""``ssim-kd compare``: runs a study."""

import argparse
import logging
import signal
import sys

from .records import Records
from .report import write_report
from .study import Run, Study, read_study


def main(args: argparse.Namespace) -> int:
    """Run a study; returns the exit status. The arguments are those of ``ssim-kd compare``."""
    # The trainings are then asked to save before this ends. A shell that starts this in the
    # background has SIGINT ignored, by the trainings too.
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        return _run(args)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on where it was.", file=sys.stderr)
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
    status = 0
    if not args.report:
        # The report alone needs neither submitit nor Optuna.
        from .running import Place, TrainingError, build_executor, finish
        from .tuning import tune

        output = (args.output or args.study.parent / "output" / study.name).resolve()
        place = Place(
            output,
            args.code and args.code.resolve(),
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
            # All stages at once, as far as no weight has to be tuned in between.
            runs: dict[str, Run] = {}
            for name in args.stages or study.content["stages"]:
                wanted = [arm for arm in study.to_be_tuned(name) if arm in (args.arms or [arm])]
                if not records.tuned.keys() >= set(wanted):
                    finish([*runs.values()], study.models, records, place)
                    tune(study, wanted, records, place)
                for by_slot in study.stage(name, records.tuned).values():
                    for run in by_slot.values():
                        if run.arm in (args.arms or [run.arm]) and run.seed in (
                            args.seeds or [run.seed]
                        ):
                            runs[run.key] = run
            finish([*runs.values()], study.models, records, place)
        except TrainingError as error:
            print(f"\n{error}", file=sys.stderr)
            status = 1
    write_report(study, records, args.docs)
    return status


def _check_names(args: argparse.Namespace, study: Study) -> None:
    seeds = {seed for stage in study.content["stages"] for _, seed in study.slots(stage)}
    known = {"stages": study.content["stages"], "arms": study.content["arms"], "seeds": seeds}
    for flag, names in known.items():
        unknown = sorted(set(getattr(args, flag) or ()) - set(names))
        if unknown:
            raise ValueError(f"--{flag}: {args.study} has no {unknown}; expected {sorted(names)}.")
