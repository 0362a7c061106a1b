"""``ssim-kd`` and ``python -m ssim_kd``: what train_net.py does, without a checkout."""

from ssim_kd.engine import argument_parser, run
from ssim_kd.projects import add_project_configs


def main() -> None:
    """Train a detector, with a teacher or without, or evaluate it."""
    run(argument_parser().parse_args(), add_project_configs)


if __name__ == "__main__":
    main()
