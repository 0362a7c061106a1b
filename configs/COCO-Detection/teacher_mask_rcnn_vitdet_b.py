"""Mask R-CNN on a plain ViT-B (51.6 box AP in Detectron2's projects/ViTDet). Detectron2 main only.

It takes RGB images of at most 1024 pixels a side, which it pads to squares.
"""

from detectron2 import model_zoo

model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
