"""FCOS by itself, the student of the distilled configs: the zoo's."""

from detectron2 import model_zoo

_zoo = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py")
model, optimizer, dataloader, train = _zoo.model, _zoo.optimizer, _zoo.dataloader, _zoo.train
lr_multiplier = _zoo.lr_multiplier
