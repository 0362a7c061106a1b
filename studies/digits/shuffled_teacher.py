#!/usr/bin/env python
"""train_net.py with a control: each image is compared with the teacher's maps of another one."""

from collections.abc import Sequence

import torch

from ssim_kd.engine import argument_parser, run
from ssim_kd.modeling import DISTILLER_REGISTRY, DistillBatch, LevelMaps, SSIMDistiller
from ssim_kd.projects import add_project_configs


@DISTILLER_REGISTRY.register()
class ShuffledTeacherDistiller(SSIMDistiller):
    """The SSIM loss with the teacher's maps moved on by one image of the batch."""

    def pyramid_loss(
        self, maps: Sequence[LevelMaps], batch: DistillBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`SSIMDistiller`."""
        others = [level._replace(teacher=level.teacher.roll(1, dims=0)) for level in maps]
        return super().pyramid_loss(others, batch)


if __name__ == "__main__":
    run(argument_parser().parse_args(), add_project_configs)
