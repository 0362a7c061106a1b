#!/usr/bin/env python
"""Train a detector with a teacher, or evaluate it. Takes the arguments of Detectron2's own."""

from ssim_kd.engine import argument_parser, run
from ssim_kd.projects import add_project_configs

if __name__ == "__main__":
    run(argument_parser().parse_args(), add_project_configs)
