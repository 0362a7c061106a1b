"""An FCOS R-101 teacher. Detectron2's zoo has no weights of one: train it first."""

from detectron2 import model_zoo

_zoo = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py")
model, optimizer, dataloader, train = _zoo.model, _zoo.optimizer, _zoo.dataloader, _zoo.train

model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
train.max_iter = 180000
train.output_dir = "output/fcos_R_101"
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_2x
