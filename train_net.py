#!/usr/bin/env python
"""Train a detector with a teacher, or evaluate it. Takes the arguments of Detectron2's own."""

from ssim_kd.__main__ import train
from ssim_kd.command_line import argument_parser

if __name__ == "__main__":
    train(argument_parser().parse_args())
