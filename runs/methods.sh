#!/bin/sh
# docs/results_methods.md and the table of projects/README.md: AP and losses of every method on the digits, what has no record in
# studies/results/methods.json, then the table. It shares its teachers with the digits study. In a checkout with `pip install -e '.[digits,study]'`.
set -e
cd "$(dirname "$0")/.."
OMP_NUM_THREADS=1 python -m ssim_kd compare studies/methods.yaml --docs docs/results_methods.md --output output/compare/digits --opts DATALOADER.NUM_WORKERS 0 "$@"
python tools/methods_table.py --losses output/compare/digits
