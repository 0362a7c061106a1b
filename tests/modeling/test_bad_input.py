"""A config that cannot work stops when the model is built, and says what is expected."""

from __future__ import annotations

import re

import pytest
import torch
from detectron2 import model_zoo
from detectron2.utils.file_io import PathManager
from torch import nn

from ssim_kd.modeling import DistilledDetector, SSIMDistiller, teacher_config, teacher_source
from tests.helpers import (
    KINDS,
    build,
    distilled_config,
    full_config,
    make_batch,
    stock_config,
    train_losses,
)

D = "MODEL.DISTILL."
NAN = float("nan")


@pytest.mark.parametrize(
    ("opts", "match"),
    [
        ([D + "NAME", "Nothing"], r"NAME: 'Nothing' .*'SSIMDistiller'"),
        ([D + "IN_FEATURES", ["p9"]], r"IN_FEATURES names \['p9'\], which the student lacks.*'p6'"),
        ([D + "IN_FEATURES", ["p3", "p4", "p3"]], r"IN_FEATURES names a level twice: .*'p3'"),
        ([D + "LOSS", "l3"], r"LOSS is 'l3'; expected one of 'ssim', 'l1', 'l2'"),
        ([D + "ADAPTER", "conv"], r"ADAPTER is 'conv'; expected one of 'auto', 'always'"),
        ([D + "ADAPTER", "none"], r"ADAPTER is 'none'.*p2 .* 32 channels and the teacher 48"),
        ([D + "SSIM.GAMMA", NAN], r"SSIM\.GAMMA is nan; expected"),
        ([D + "LEVEL_WEIGHTS", [1.0, 1.0]], r"LEVEL_WEIGHTS has 2 weights for the 5 levels"),
        ([D + "STUDENT_META_ARCHITECTURE", "YOLO"], r"STUDENT_META_ARCHITECTURE is 'YOLO'"),
        (
            [D + "STUDENT_META_ARCHITECTURE", "DistilledDetector"],
            r"STUDENT_META_ARCHITECTURE is 'DistilledDetector'; expected",
        ),
        (
            [D + "STUDENT_META_ARCHITECTURE", "RetinaNet"],
            r"STUDENT_META_ARCHITECTURE 'RetinaNet' .*'p7'",
        ),
    ],
)
def test_a_bad_value(opts, match, weights_of) -> None:
    """Values out of a method's range are in the tests of the methods."""
    cfg = distilled_config("faster", "faster", weights_of("faster"))
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        node = cfg
        *path, name = key.split(".")
        for part in path:
            node = node[part]
        node[name] = value  # as YAML would, where .nan and .inf are numbers
    with pytest.raises(ValueError, match=match) as caught:
        build(cfg)
    assert "MODEL.DISTILL." in str(caught.value)


def test_a_level_that_the_teacher_lacks(weights_of) -> None:
    cfg = distilled_config(
        "retinanet", "faster", weights_of("faster"), D + "IN_FEATURES", ["p6", "p7"]
    )
    with pytest.raises(ValueError, match=r"names \['p7'\], which the teacher lacks; it has .*'p2'"):
        build(cfg)


def test_no_common_level(weights_of) -> None:
    with pytest.raises(ValueError, match=r"share no level.*p2 \(stride 4\).*res4 \(stride 16\)"):
        build(distilled_config("faster", "c4", weights_of("c4")))
    # Equal names do not make a level common: both have res5, at strides 16 and 32.
    with pytest.raises(ValueError, match=r"res5 \(stride 16\).*res5 \(stride 32\)"):
        build(distilled_config("dc5", "faster", weights_of("faster")))


# The teacher


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("", "NAME is empty; expected .* a name of the model zoo"),
        ("no/such.yaml", "NAME is 'no/such.yaml': .* name of the model zoo"),
        (".", "NAME is '.', but . holds no config.yaml"),
    ],
)
def test_no_teachers_config(name, match, weights_of, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = distilled_config("faster", "faster", weights_of("faster"))
    cfg.MODEL.DISTILL.TEACHER.NAME = name
    # To evaluate the student, its teacher is not needed.
    model = build(cfg)
    assert len(model.eval()(make_batch())) == 2
    with pytest.raises(ValueError, match="MODEL.DISTILL.TEACHER." + match):
        train_losses(model)


@pytest.mark.parametrize(
    "text",
    [
        "MODEL: [1, 2",
        "MODEL:\n  WEIGHTS: 3\n",
        "_BASE_: nowhere.yaml\n",
        "just words",
        "\x00\x01",
        "SEED: !!python/object/apply:os.system ['touch ran']\n",
        "_BASE_: evil.yaml\n",
        "MODEL:\n  META_ARCHITECTURE: YOLO\n",
        "MODEL:\n  BACKBONE:\n    NAME: no_such_backbone\n",
    ],
)
def test_an_unreadable_teachers_config(text, weights_of, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.yaml").write_text("SEED: !!python/object/apply:os.system ['touch ran']\n")
    file = tmp_path / "teacher.yaml"
    file.write_text(text)
    cfg = distilled_config("faster", "faster", weights_of("faster"))
    cfg.MODEL.DISTILL.TEACHER.NAME = str(file)
    cfg.MODEL.DISTILL.TEACHER.OPTS = []
    with pytest.raises(
        ValueError, match=f"MODEL.DISTILL.TEACHER.NAME .*{re.escape(repr(str(file)))}"
    ):
        build(cfg)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "opts", [["MODEL.NO_SUCH_KEY", 1], ["MODEL.MASK_ON"], ["MODEL.RESNETS.DEPTH", "deep"]]
)
def test_bad_overrides_of_the_teachers_config(opts, weights_of) -> None:
    cfg = distilled_config("faster", "faster", weights_of("faster"), teacher_opts=opts)
    with pytest.raises(ValueError, match=r"MODEL\.DISTILL\.TEACHER\..*OPTS.*" + opts[0]):
        build(cfg)


def test_the_wrong_weights_name_the_key(weights_of) -> None:
    for kind in ("retinanet", "c4"):
        cfg = distilled_config("faster", "faster", weights_of(kind))
        model = build(cfg)
        for use in (model.load_teacher, lambda m=model: train_losses(m)):
            with pytest.raises(ValueError, match=r"TEACHER\.WEIGHTS is '.*keys (missing|unexpec)"):
                use()
    cfg = distilled_config("faster", "faster", "gone.pth")
    with pytest.raises(ValueError, match=r"TEACHER\.WEIGHTS is 'gone\.pth': no such file"):
        build(cfg).load_teacher()


def test_a_teacher_without_a_backbone_of_detectron2(weights_of) -> None:
    cfg = distilled_config(
        "faster", "faster", weights_of("faster"), teacher_opts=["MODEL.META_ARCHITECTURE", "Odd"]
    )
    with pytest.raises(ValueError, match=r"MODEL\.DISTILL\.TEACHER\.NAME .*'Odd'"):
        build(cfg)


# Where the weights of a teacher are looked for


def test_a_zoo_name_is_its_url(weights_of, monkeypatch) -> None:
    cfg = distilled_config("faster", "faster", "")
    asked = []

    def get_local_path(path, **_kwargs):
        asked.append(path)
        return str(weights_of("faster"))

    monkeypatch.setattr(PathManager, "get_local_path", get_local_path)
    model = build(cfg)
    assert asked == []
    model.load_teacher()
    assert asked == [
        "https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/"
        "faster_rcnn_R_50_FPN_1x/137257794/model_final_b275ba.pkl"
    ]
    saved = torch.load(weights_of("faster"))["model"]
    assert torch.equal(
        model.load_teacher().backbone.state_dict()["fpn_output2.weight"],
        saved["backbone.fpn_output2.weight"],
    )


@pytest.mark.parametrize(
    ("config", "weights", "expected"),
    [
        (KINDS["faster"], "", model_zoo.get_checkpoint_url(KINDS["faster"])),
        (KINDS["faster"], KINDS["mask"], model_zoo.get_checkpoint_url(KINDS["mask"])),
        (KINDS["faster"], "a/file.pth", "a/file.pth"),
        (KINDS["faster"], "detectron2://a/b.pkl", "detectron2://a/b.pkl"),
    ],
)
def test_where_the_weights_are(config, weights, expected) -> None:
    cfg = full_config()
    cfg.MODEL.DISTILL.TEACHER.NAME = config
    cfg.MODEL.DISTILL.TEACHER.WEIGHTS = weights
    assert expected == teacher_source(cfg).cfg.MODEL.WEIGHTS


def test_a_config_of_ones_own_needs_weights(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("SEED: 1\n")
    cfg = full_config()
    cfg.MODEL.DISTILL.TEACHER.NAME = str(tmp_path / "mine.yaml")
    with pytest.raises(
        ValueError, match=r"TEACHER\.WEIGHTS is ''.*'mine\.yaml'|TEACHER\.WEIGHTS is ''"
    ):
        teacher_source(cfg)
    cfg.MODEL.DISTILL.TEACHER.WEIGHTS = "nowhere/faster.yaml"
    with pytest.raises(ValueError, match=r"TEACHER\.WEIGHTS is 'nowhere/faster\.yaml'"):
        teacher_source(cfg)


def test_a_triton_that_cannot_be_had_is_told_with_its_key(weights_of, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    opts = (D + "SSIM.IMPL", "triton")
    with pytest.raises(ValueError, match=r"DISTILL\.SSIM\.IMPL='triton' .*CUDA"):
        build(distilled_config("faster", "faster", weights_of("faster"), *opts))


@pytest.mark.parametrize(("ours", "theirs"), [("YUV-BT.601", "BGR"), ("BGR", "L")])
def test_channel_orders_that_cannot_be_converted(ours, theirs, weights_of) -> None:
    cfg = distilled_config(
        "faster", "faster", weights_of("faster"), teacher_opts=["INPUT.FORMAT", theirs]
    )
    cfg.INPUT.FORMAT = ours
    with pytest.raises(ValueError, match=rf"FORMAT is '{ours}', but the teacher's is '{theirs}'"):
        build(cfg)


def test_without_distillation_no_teacher_is_read(weights_of, monkeypatch) -> None:
    monkeypatch.setattr(
        teacher_config, "read_weights", lambda *_a, **_k: pytest.fail("the teacher was read")
    )
    build(distilled_config("faster", "faster", weights_of("faster"), D + "ENABLED", False))


class _Student(nn.Module):
    """As much of a detector as distillers look at."""

    def __init__(self, backbone: nn.Module | None, channels: int = 3, *, direct: bool = True):
        super().__init__()
        if backbone is not None:
            self.backbone = backbone
        self.direct = direct
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("pixel_mean", torch.zeros(channels, 1, 1))

    def forward(self, inputs):
        images = torch.stack([x["image"].float() for x in inputs])
        call = self.backbone if self.direct else self.backbone.forward
        return {"loss_x": sum(v.square().mean() for v in call(images).values())}


@pytest.fixture(scope="module")
def teacher(weights_of):
    return build(distilled_config("faster", "faster", weights_of("faster"))).teacher


def test_student_without_backbone(teacher) -> None:
    with pytest.raises(ValueError, match="_Student has no 'backbone'"):
        DistilledDetector(student=_Student(None), teacher=teacher, distillers=[SSIMDistiller()])


def test_student_of_other_channels(teacher) -> None:
    student = _Student(build(stock_config("faster")).backbone, channels=4)
    with pytest.raises(ValueError, match=r"MODEL\.PIXEL_MEAN has 4 .* 3"):
        DistilledDetector(student=student, teacher=teacher, distillers=[SSIMDistiller()])


@pytest.mark.parametrize("direct", [True, False])
def test_student_that_does_not_call_its_backbone_as_a_module(direct, teacher) -> None:
    student = _Student(build(stock_config("faster")).backbone, direct=direct)
    model = DistilledDetector(student=student, teacher=teacher, distillers=[SSIMDistiller()])
    if direct:
        assert "loss_distill" in train_losses(model, make_batch([(96, 96)]))
    else:
        with pytest.raises(ValueError, match=r"_Student .*'p2'"):
            train_losses(model, make_batch([(96, 96)]))
