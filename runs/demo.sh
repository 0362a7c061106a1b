#!/bin/sh
# docs/demo.md and the picture of README.md: output/demo/summary.json and demo.png. Minutes on two cores.
set -e
cd "$(dirname "$0")/.."
python tools/demo.py "$@"
