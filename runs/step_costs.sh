#!/bin/sh
# "step / l2" in projects/README.md: a step with each method over a step with l2, interleaved, processor time.
set -e
cd "$(dirname "$0")/.."
OMP_NUM_THREADS=1 python tools/benchmark_step.py --cpu-time \
    --arms pkd cwd mgd fgd fbkd icd drkd crosskd dkd reviewkd vfm --output projects/results/step.json "$@"
python tools/methods_table.py
