#!/bin/sh
# RetinaNet R-50 without a teacher: 37.4 AP in the model zoo, 1x schedule (90000 iterations of 16 images).
# Tried for 3 iterations on 20 images and a CPU only.
# Estimate, from the times that Detectron2 publishes for RetinaNet on 8 V100 in float32 (0.205 s an iteration of R-50; a forward
# of R-101 on top): 5 hours and 4.1 GB a GPU. Needs COCO 2017 below $DETECTRON2_DATASETS.
# On one GPU, with rate and iterations scaled: runs/coco_plain.sh --num-gpus 1 --batch 4
set -e
cd "$(dirname "$0")/.."
python train_net.py --config-file configs/COCO-Detection/plain_retinanet_R_50_FPN_1x.yaml --num-gpus 8 "$@" \
    OUTPUT_DIR "${OUTPUT:-output/coco/plain}"
