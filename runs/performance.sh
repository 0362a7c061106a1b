#!/bin/sh
# docs/performance.md: output/benchmark_losses, benchmark_step and benchmark_teacher. Needs the extra "bench".
set -e
cd "$(dirname "$0")/.."
python tools/benchmark_losses.py --batch 1 --channels 256 "$@"
python tools/benchmark_step.py "$@"
python tools/benchmark_teacher.py "$@"
