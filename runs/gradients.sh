#!/bin/sh
# docs/results.md, "Why", from studies/digits/gradients.json, which this writes: how strong each loss is next to the detection
# losses, at the end of runs of runs/digits_study.sh. Those that have a record are not there; train them anew:
# runs/digits_study.sh --records /tmp/anew.json --stages short --seeds 1 2 3
set -e
cd "$(dirname "$0")/.."
runs=output/compare/digits
python studies/digits/gradients.py $runs/short/ssim/t1/1 $runs/short/ssim/t2/2 $runs/short/ssim_4/t1/3 $runs/short/ssim_4/t2/2 \
    $runs/short/l2/t1/1 $runs/short/l2/t2/2 $runs/tuning/l2/500/t1/101 "$@" > $runs/gradients.json
# Whole or not at all.
mv $runs/gradients.json studies/digits/gradients.json
