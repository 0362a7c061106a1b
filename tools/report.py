#!/usr/bin/env python
"""Write the page of a training, or of several side by side.

    python tools/report.py output/distilled
    python tools/report.py output/ssim output/pkd output/l2 --control output/plain --output all.html

The folders are those of trainings, their OUTPUT_DIR. docs/report.md has what the page shows.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ssim_kd.config import share_keys
from ssim_kd.projects import add_project_configs
from ssim_kd.reporting import write_report


def main(argv: list[str] | None = None) -> int:
    """See above; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a training")
    parser.add_argument("--teacher", type=Path, metavar="RUN", help="the teacher's training")
    parser.add_argument("--control", type=Path, metavar="RUN", help="a plain run to compare with")
    parser.add_argument("--output", type=Path, metavar="FILE", help="RUN/report.html by default")
    args = parser.parse_args(argv)
    output = args.output or args.runs[0] / "report.html"
    share_keys(add_project_configs)
    try:
        write_report(args.runs, output, teacher=args.teacher, control=args.control)
    except (OSError, ValueError) as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
