"""``ssim-kd`` and ``python -m ssim_kd``: one program for all commands.

A command line is read before torch and Detectron2 are imported: help and errors take no time.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ssim_kd import command_line


class Command(NamedTuple):
    """A line of the usage, the parser, what runs with the arguments, and the extra it needs."""

    text: str
    parser: Callable[..., argparse.ArgumentParser]
    run: Callable[[argparse.Namespace], Any]
    extra: str = ""


def train(args: argparse.Namespace) -> None:
    """Train a detector, with a teacher or without, or evaluate it."""
    from ssim_kd.engine import run
    from ssim_kd.projects import add_project_configs

    run(args, add_project_configs)


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate a student, or with --eval-teacher the teacher."""
    args.eval_only = True
    train(args)


def export(args: argparse.Namespace) -> None:
    """Write what runs elsewhere."""
    from ssim_kd.export import main

    main(args)


def report(args: argparse.Namespace) -> None:
    """Write a page of runs."""
    from ssim_kd.config import share_keys
    from ssim_kd.projects import add_project_configs
    from ssim_kd.reporting import write_report

    output = args.output or args.runs[0] / "report.html"
    share_keys(add_project_configs)
    write_report(args.runs, output, teacher=args.teacher, control=args.control)
    print(output)


def visualize(args: argparse.Namespace) -> None:
    """Draw what is compared."""
    from ssim_kd.sheets import main

    main(args)


def compare(args: argparse.Namespace) -> int:
    """Run a study."""
    from ssim_kd.comparing.compare import main

    return main(args)


def doctor(args: argparse.Namespace) -> int:
    """Check this machine."""
    from ssim_kd.doctor import main

    return main(args)


COMMANDS = {
    "train": Command("a detector, with a teacher or without", command_line.argument_parser, train),
    "eval": Command("a trained student, or its teacher", command_line.argument_parser, evaluate),
    "export": Command("a student to ONNX and others", command_line.export_parser, export),
    "report": Command("a page of one or more runs", command_line.report_parser, report, "report"),
    "visualize": Command(
        "pictures of what is compared", command_line.visualize_parser, visualize, "report"
    ),
    "compare": Command("methods over seeds", command_line.compare_parser, compare, "study"),
    "doctor": Command("is this machine ready", command_line.argument_parser, doctor),
}


def usage() -> str:
    """The commands, a line each."""
    lines = [f"  {name:10s} {command.text}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ssim-kd COMMAND ...",
            "",
            *lines,
            "",
            "ssim-kd COMMAND --help has the arguments. Without a command: train.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    name, program = "train", None
    if argv[0] in COMMANDS:
        name, *argv = argv
        program = f"ssim-kd {name}"
    elif argv[0].isalpha() and argv[0].islower():
        print(f"{argv[0]!r} is not a command.\n{usage()}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    args = command.parser(program).parse_args(argv)
    command_line.quiet_libraries()
    if name in ("train", "eval"):  # run() has its own rules for errors
        command.run(args)
        return 0
    try:
        return command.run(args) or 0
    except ModuleNotFoundError as error:
        if not command.extra:
            raise
        print(f"ERROR: {error}: pip install 'ssim_kd[{command.extra}]'.", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        from ssim_kd.sharing import without_queries

        print(f"ERROR: {without_queries(str(error))}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
