#!/bin/sh
# docs/results.md: trains what has no record in studies/results/digits.json, then writes the page. Hours of two cores from nothing.
# In a checkout with `pip install -e '.[digits,study]'`. Only some stages: runs/digits_study.sh --stages main
set -e
cd "$(dirname "$0")/.."
OMP_NUM_THREADS=1 python -m ssim_kd compare studies/digits.yaml --docs docs/results.md --output output/compare/digits --opts DATALOADER.NUM_WORKERS 0 "$@"
