#!/usr/bin/env python
"""Compare methods with seeds: trains what a study asks for, and writes its statistics.

    tools/compare.py studies/digits.yaml

What has a record is not trained again: stop it whenever you like, and start it again. Results go
into studies/results/NAME.json after each training; tables and plots are made from that file alone
(--report makes them without any training).
"""

import argparse
import logging
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.comparing.records import Records  # noqa: E402
from tools.comparing.report import write_report  # noqa: E402
from tools.comparing.study import Run, Study, read_study  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Run a study; returns the exit status."""
    args = parse(argv)
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
        from tools.comparing.running import Place, TrainingError, build_executor, finish
        from tools.comparing.tuning import tune

        output = (args.output or ROOT / "output" / "compare" / study.name).resolve()
        place = Place(
            output,
            args.code.resolve(),
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
                for run in study.stage(name, records.tuned):
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
    seeds = {seed for stage in study.content["stages"].values() for seed in stage["seeds"]}
    known = {"stages": study.content["stages"], "arms": study.content["arms"], "seeds": seeds}
    for flag, names in known.items():
        unknown = sorted(set(getattr(args, flag) or ()) - set(names))
        if unknown:
            raise ValueError(f"--{flag}: {args.study} has no {unknown}; expected {sorted(names)}.")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="a .yaml file: see studies/README.md")
    parser.add_argument("--stages", nargs="+", help="of the study; default: all, in its order")
    parser.add_argument("--arms", nargs="+", help="of the stages; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="of the stages; default: all")
    parser.add_argument("--records", type=Path, help="default: results/NAME.json beside the study")
    parser.add_argument(
        "--docs", type=Path, help="page to write, default: NAME.md beside the records"
    )
    parser.add_argument(
        "--output", type=Path, help="folder of the trainings, default: output/compare/NAME"
    )
    parser.add_argument(
        "--code", type=Path, default=ROOT, help="the checkout that trains, default: this one"
    )
    parser.add_argument(
        "--cluster", default="local", choices=["local", "slurm"], help="submitit's executor"
    )
    parser.add_argument("--workers", type=int, default=2, help="trainings at once")
    parser.add_argument(
        "--submitit", nargs="+", default=[], metavar="NAME=VALUE", help="e.g. slurm_partition=gpu"
    )
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE", help="place and speed: MODEL.DEVICE"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    # The trainings are then asked to save before this ends. A shell that starts this in the
    # background has SIGINT ignored, by the trainings too.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on where it was.", file=sys.stderr)
        sys.exit(130)
