#!/bin/sh
# docs/pairs.md: which students learn from which teachers. Needs the extras "timm" and "detr".
set -e
cd "$(dirname "$0")/.."
python tools/pairs.py "$@"
