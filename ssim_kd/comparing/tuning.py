"""Tune the weight of each arm by Optuna, on a separate split and separate seeds."""

import logging
from collections.abc import Iterable, Mapping

import optuna

from .records import Records
from .running import Place, finish
from .statistics import summarise
from .study import Run, Study

logger = logging.getLogger(__name__)

METRIC = "AP"


def tune(study: Study, arms: Iterable[str], records: Records, place: Place) -> None:
    """Find the best weight of each arm, and freeze it in the records.

    Each arm gets the same budget: first the weights that the study lists, then ``refine`` more
    that Optuna's TPE suggests. A weight is worth the mean AP over the tuning seeds. What is frozen
    stays if the study changes later: remove it from the records to tune again.
    """
    tuning, models = study.content.get("tuning", {}), study.models
    for arm in arms:
        if arm in records.tuned:
            continue
        trials = _study_of(tuning)
        for weight in tuning["values"]:
            trials.enqueue_trial({"weight": float(weight)})
        asked = [_ask(trials, tuning) for _ in tuning["values"]]
        # All at once: their weights do not depend on each other.
        every = [run for _, weight in asked for run in study.trials(arm, weight)]
        finish(every, models, records, place)
        for trial, weight in asked:
            trials.tell(trial, worth(study, records, arm, weight))
        for _ in range(tuning.get("refine", 0)):
            trial, weight = _ask(trials, tuning)
            finish(study.trials(arm, weight), models, records, place)
            trials.tell(trial, worth(study, records, arm, weight))
        records.tuned[arm] = trials.best_params["weight"]
        records.save()
        logger.info("%s: weight %g", arm, records.tuned[arm])


def worth(study: Study, records: Records, arm: str, weight: float) -> float:
    """Mean AP on the tuning split."""
    runs: list[Run] = study.trials(arm, weight)
    return summarise([records.runs[run.key]["metrics"][METRIC] for run in runs]).mean


def _study_of(tuning: Mapping) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # The same trials lead to the same next one, so that a study can be taken up.
    sampler = optuna.samplers.TPESampler(
        seed=tuning.get("sampler_seed", 0), n_startup_trials=len(tuning["values"])
    )
    return optuna.create_study(direction="maximize", sampler=sampler)


def _ask(trials: optuna.Study, tuning: Mapping) -> tuple[optuna.Trial, float]:
    low, high = min(tuning["values"]), max(tuning["values"])
    trial = trials.ask()
    weight = trial.suggest_float("weight", float(low), float(high), log=True)
    return trial, float(f"{weight:.3g}")
