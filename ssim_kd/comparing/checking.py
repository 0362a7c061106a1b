"""Checks of a study before anything is trained."""

from collections.abc import Iterable, Mapping

from detectron2.modeling import build_model

from ..command_line import argument_parser
from ..data import check_datasets, register_datasets
from ..engine import load_config
from ..modeling import teacher_source
from ..projects import add_project_configs
from .running import Place, overrides
from .study import TEACHER, Run


def check(runs: Iterable[Run], models: Mapping[str, Run], place: Place) -> None:
    """Read the config of each training as it will, check its data and build its model.

    Seeds of an arm are the same training here; one by a script is the script's.

    Raises:
        ValueError: naming the training.
    """
    checked = set()
    for run in runs:
        opts = {**overrides(run, models, place), "SEED": 0, "OUTPUT_DIR": "unused"}
        command = ["--config-file", str(run.config), *(str(x) for kv in opts.items() for x in kv)]
        if run.script or str(command) in checked:
            continue
        checked.add(str(command))
        try:
            cfg = load_config(argument_parser().parse_args(command), add_project_configs)
            if str(cfg.DATASETS) not in checked:
                register_datasets(cfg)
                check_datasets(cfg, train=True)
                checked.add(str(cfg.DATASETS))
            if opts.get(TEACHER) and not run.teacher:
                teacher_source(cfg)  # what the study trains is not there yet
            build_model(cfg)
        except Exception as error:
            raise ValueError(f"{run.key}: {error}") from error
