#!/bin/sh
# RetinaNet R-50 <- R-101 (40.4 AP), SSIM with the paper's weight, 4: 40.1 AP in the paper, 1x schedule (90000 iterations of 16 images).
# Tried for 3 iterations on 20 images and a CPU only.
# Estimate, from the times that Detectron2 publishes for RetinaNet on 8 V100 in float32 (0.205 s an iteration of R-50; a forward
# of R-101 on top): 8 hours and 6 GB a GPU. Needs COCO 2017 below $DETECTRON2_DATASETS.
# On one GPU, with rate and iterations scaled: runs/coco_ssim.sh --num-gpus 1 --batch 4
set -e
cd "$(dirname "$0")/.."
python train_net.py --config-file configs/COCO-Detection/ssim_retinanet_R_50_FPN_1x.yaml --num-gpus 8 "$@" \
    OUTPUT_DIR "${OUTPUT:-output/coco/ssim}"
