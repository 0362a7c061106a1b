"""Teachers that are not Detectron2 models: any Module that returns maps."""

from collections.abc import Mapping, Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import nn


class ModuleTeacher(nn.Module):
    """What a :class:`FrozenTeacher` needs of a detector, around any Module that returns maps.

        body = create_feature_extractor(resnet, {"layer2": "res3", "layer3": "res4"})
        shapes = {"res3": ShapeSpec(channels=512, stride=8), ...}
        teacher = FrozenTeacher(ModuleTeacher(body, shapes, pixel_mean=..., pixel_std=...))

    Attributes:
        backbone: returns the maps by level.
        pixel_mean, pixel_std: (C, 1, 1), of pixels in [0, 255].
        input_format: channel order that the Module was trained on.
    """

    def __init__(
        self,
        module: nn.Module,
        shapes: Mapping[str, ShapeSpec],
        *,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
        size_divisibility: int = 0,
    ) -> None:
        """
        Args:
            module: maps images (N, C, H, W) to a dict of maps by level, or to a sequence of maps in
                the order of ``shapes``.
            shapes: channels and stride by level; the student's level of the same name and stride
                is compared with it.
            pixel_mean, pixel_std: of images with values in [0, 255], a number a channel.
            input_format: channel order of the images, "RGB" or "BGR".
            size_divisibility: images are padded at the right and bottom to multiples of it; 0 for
                the greatest stride.

        Raises:
            ValueError: maps that are not as ``shapes`` describes them.
        """
        super().__init__()
        self.backbone = _MapBackbone(module, shapes, size_divisibility)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.input_format = input_format
        self.backbone.check(len(pixel_mean))


class _MapBackbone(Backbone):
    """A Module that returns maps, as a Detectron2 backbone."""

    def __init__(
        self, module: nn.Module, shapes: Mapping[str, ShapeSpec], size_divisibility: int
    ) -> None:
        super().__init__()
        self.module = module
        self._shapes = dict(shapes)
        self._divisibility = size_divisibility or max(s.stride for s in shapes.values())

    @property
    def size_divisibility(self) -> int:
        return self._divisibility

    def output_shape(self) -> dict[str, ShapeSpec]:
        return dict(self._shapes)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.module(images)
        if not isinstance(maps, Mapping):
            maps = dict(zip(self._shapes, maps, strict=True))
        return {level: maps[level] for level in self._shapes}

    @torch.no_grad()
    def check(self, channels: int) -> None:
        """Compare the maps of a small image with their description."""
        height = width = max(self._divisibility, 64)
        width *= 2
        training = self.training
        parameter = next(self.parameters(), torch.zeros(()))
        images = torch.zeros(
            1, channels, height, width, device=parameter.device, dtype=parameter.dtype
        )
        try:
            found = {k: tuple(v.shape) for k, v in self.eval()(images).items()}
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"The teacher {type(self.module).__name__} does not return the levels "
                f"{list(self._shapes)} ({error}); expected a dict by level, or one map a level."
            ) from error
        self.train(training)
        expected = {
            level: (1, s.channels, -(-height // s.stride), -(-width // s.stride))
            for level, s in self._shapes.items()
        }
        unlike = {k: (found[k], expected[k]) for k in expected if found[k] != expected[k]}
        if unlike:
            raise ValueError(
                f"The teacher {type(self.module).__name__} returns maps of other shapes than its "
                f"description's channels and strides give (found, expected): {unlike}."
            )
