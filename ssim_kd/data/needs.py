"""What a student and its evaluation ask of the data sets: :class:`Needs`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from detectron2.config import CfgNode

_BOXES = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}
_STUFF = ("PanopticFPN", "SemanticSegmentor")


@dataclass(frozen=True)
class Needs:
    """What the checks and loaders of data have to know, as values.

    Attributes:
        train, test: names of the sets.
        num_classes: of the student; None: unknown, or it has none.
        num_classes_key: what sets it, for messages.
        num_stuff: semantic classes of the student; None: it predicts none.
        masks: whether it predicts masks.
        mask_format: "polygon" or "bitmask".
        keypoints: number of keypoints of an object; 0: it predicts none.
        least_keypoints: visible keypoints of an image below which it is not trained on.
        filter_empty: whether images without objects are left out of the training.
        zero_area: "error" or "drop": what becomes of boxes of zero area in the training sets.
        train_proposals, test_proposals: files of precomputed proposals, one a set; None: not read.
        detections_per_image: that an evaluation keeps.
        oks_sigmas: of the keypoints; empty: those of COCO.
        expected_results: rows of task, metric, value, tolerance.
        keys: what the user's config calls a key of ours, for messages; by default the same.
    """

    train: Any = ()
    test: Any = ()
    num_classes: int | None = None
    num_classes_key: str = "the student's class count"
    num_stuff: int | None = None
    masks: bool = False
    mask_format: str = "polygon"
    keypoints: int = 0
    least_keypoints: int = 1
    filter_empty: bool = True
    zero_area: str = "error"
    train_proposals: Any = None
    test_proposals: Any = None
    detections_per_image: int = 100
    oks_sigmas: Any = ()
    expected_results: Any = ()
    keys: Mapping[str, str] = field(default_factory=dict)

    def key(self, name: str) -> str:
        """What the user's config calls a key of ours."""
        return self.keys.get(name, name)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "Needs":
        """Read what a YAML config asks for."""
        head, proposals = cfg.MODEL.ROI_KEYPOINT_HEAD, cfg.MODEL.LOAD_PROPOSALS
        stuff = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES if _architecture(cfg) in _STUFF else None
        key = num_classes_key(cfg)
        return cls(
            train=cfg.DATASETS.TRAIN,
            test=cfg.DATASETS.TEST,
            num_classes=num_classes(cfg),
            num_classes_key=key or cls.num_classes_key,
            num_stuff=stuff,
            # RetinaNet does not read MASK_ON.
            masks=bool(cfg.MODEL.MASK_ON) and key == "MODEL.ROI_HEADS.NUM_CLASSES",
            mask_format=cfg.INPUT.MASK_FORMAT,
            keypoints=head.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0,
            least_keypoints=head.MIN_KEYPOINTS_PER_IMAGE,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            zero_area=cfg.DATASETS.ZERO_AREA_BOXES,
            train_proposals=cfg.DATASETS.PROPOSAL_FILES_TRAIN if proposals else None,
            test_proposals=cfg.DATASETS.PROPOSAL_FILES_TEST if proposals else None,
            detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
            oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
            expected_results=cfg.TEST.EXPECTED_RESULTS,
        )


def _architecture(cfg: CfgNode) -> str:
    name: str = cfg.MODEL.META_ARCHITECTURE
    return cfg.MODEL.DISTILL.STUDENT_META_ARCHITECTURE if name == "DistilledDetector" else name


def num_classes_key(cfg: CfgNode) -> str | None:
    """Return the config key that holds the student's class count, or None if it has none."""
    return _BOXES.get(_architecture(cfg))


def num_classes(cfg: CfgNode) -> int | None:
    """Return the student's class count, or None if it has none."""
    key = num_classes_key(cfg)
    return None if key is None else int(attrgetter(key)(cfg))
