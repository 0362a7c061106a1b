"""The teacher: a detector of any kind, as it was found; its weights are loaded later."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from ..ops.options import check_choice
from .loaded_teacher import LoadedTeacher, TeacherOptions
from .taps import tappable_levels
from .teacher_config import TeacherSource, source_of, teacher_source

_DTYPES = ("float32", "float16", "bfloat16")


class FrozenTeacher:
    """A detector that teaches: its structure, and the place of its weights.

    It never changes, so that one can serve several trainings. :meth:`load` reads the weights and
    returns the detector that runs.

        teacher = FrozenTeacher(detector)                                  # a Module, as it is
        teacher = FrozenTeacher.load_from("COCO-Detection/retinanet_R_101_FPN_3x.yaml")

    Attributes:
        model: the whole detector. If its weights are still to be loaded, only its shapes count.
        options: how it runs.
    """

    #: Its source; None for a module.
    source: TeacherSource | None = None

    def __init__(
        self,
        model: Any,
        *,
        input_format: str = "",
        load: Callable[[str], tuple[Any, str]] | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            model: a detector with ``backbone``, ``pixel_mean`` and ``pixel_std``; it is frozen in
                place. With ``load``, only its shapes are used.
            input_format: channel order that the teacher was trained on; "" for the model's
                ``input_format``, or BGR if it has none.
            load: returns the detector with its weights, and their SHA-256; its argument is the
                prefix of the keys that must fit, "" for all.
            options: further ones of :class:`TeacherOptions`: image_format, dtype, fold_bn,
                channels_last, compiled.

        Raises:
            ValueError: a model without one of these attributes.
        """
        for name in ("backbone", "pixel_mean", "pixel_std"):
            if not hasattr(model, name):
                raise ValueError(
                    f"The teacher {type(model).__name__} has no {name!r}; expected a detector "
                    "like GeneralizedRCNN or RetinaNet."
                )
        input_format = input_format or getattr(model, "input_format", None) or "BGR"
        self.options = TeacherOptions(input_format=input_format, **options)
        self.model = model.requires_grad_(False).eval()
        self._load = load

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "FrozenTeacher":
        """The teacher of ``MODEL.DISTILL.TEACHER``.

        Args:
            cfg: the student's config.

        Raises:
            ValueError: what :func:`teacher_source` raises, or a teacher that cannot be built.
        """
        node = cfg.MODEL.DISTILL.TEACHER
        return cls._from_source(
            teacher_source(cfg),
            image_format=cfg.INPUT.FORMAT,
            dtype=teacher_dtype(cfg),
            fold_bn=node.FOLD_BN,
            channels_last=node.CHANNELS_LAST,
            compiled=node.COMPILE,
        )

    @classmethod
    def load_from(
        cls, name: str, weights: str = "", opts: Sequence[Any] = (), **options: Any
    ) -> "FrozenTeacher":
        """A teacher by its name; also for LazyConfigs.

        Args:
            name, weights: see :func:`find_teacher`.
            opts: overrides of its config: KEY, VALUE, ... for a YAML, "key=value" for a LazyConfig.
            options: of the constructor.

        Raises:
            ValueError: as :meth:`from_config`.
        """
        return cls._from_source(source_of(name, weights, opts), **{"fold_bn": True, **options})

    @classmethod
    def _from_source(cls, source: TeacherSource, **options: Any) -> "FrozenTeacher":
        input_format = source.input_format
        teacher = cls(source.structure(), input_format=input_format, load=source.load, **options)
        teacher.source = source
        return teacher

    @property
    def levels(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every level that can be tapped."""
        return tappable_levels(self.model)

    @property
    def input_format(self) -> str:
        """Channel order that it was trained on."""
        return self.options.input_format

    def check(self, names: Sequence[str], image_format: str = "") -> None:
        """Check that :meth:`load` can serve these arguments.

        Raises:
            ValueError: a name that cannot be tapped; a channel order that is not the teacher's and
                cannot be converted to it.
        """
        given = self.options.image_format or image_format or self.input_format
        pair = {self.input_format, given}
        if len(pair) > 1 and pair != {"BGR", "RGB"}:
            raise ValueError(
                f"INPUT.FORMAT is {given!r}, but the teacher's is {self.input_format!r}; expected "
                "the same, or BGR and RGB, between which images are converted."
            )
        beyond = [n for n in names if n not in self.levels and not n.startswith("backbone.")]
        if beyond:
            raise ValueError(
                f"The teacher's {beyond} cannot be tapped: only its backbone runs. A distiller "
                "calls heads itself, by batch.teacher."
            )
        outputs = self.model.backbone.output_shape()
        inner = [name for name in names if name not in outputs]
        if inner and self.options.compiled:
            raise ValueError(
                f"{inner} of a compiled teacher cannot be tapped (MODEL.DISTILL.IN_FEATURES, or "
                "what both models share if that is empty): set MODEL.DISTILL.TEACHER.COMPILE to "
                "False."
            )

    def load(
        self,
        names: Sequence[str] | None = None,
        *,
        heads: bool = False,
        keep: Sequence[str] = (),
        image_format: str = "",
    ) -> LoadedTeacher:
        """Read the weights: the teacher that runs.

        Args:
            names: what its calls return: levels, or paths of submodules of the backbone
                ("backbone.bottom_up.res5"). None: all outputs of the backbone.
            heads: whether distillers call the detector's heads.
            keep: names of tensors to be kept as they are before folding.
            image_format: channel order of the images, if the constructor was given none.

        Raises:
            ValueError: what :meth:`check` and :meth:`TeacherSource.load` raise.
        """
        names = list(self.model.backbone.output_shape()) if names is None else names
        self.check(names, image_format)
        model, sha256 = self.model, ""
        if self._load is not None:
            model, sha256 = self._load("" if heads or keep else "backbone.")
        options = replace(self.options, image_format=self.options.image_format or image_format)
        return LoadedTeacher(model, names, options, heads=heads, keep=keep, sha256=sha256)


def teacher_dtype(cfg: CfgNode) -> torch.dtype:
    """The precision of ``TEACHER.PRECISION``.

    Raises:
        ValueError: an unknown one.
    """
    name = cfg.MODEL.DISTILL.TEACHER.PRECISION
    check_choice("MODEL.DISTILL.TEACHER.PRECISION", name, (*_DTYPES, "auto"))
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    if not cfg.SOLVER.AMP.ENABLED:
        return torch.float32
    return torch.float16 if cfg.MODEL.DEVICE.startswith("cuda") else torch.bfloat16
