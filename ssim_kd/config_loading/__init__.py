"""From the command line to a config, of either language, and its schedule."""

from .lazy_config import LazySchedule, load_lazy
from .schedule import Schedule, rescale, value_of
from .yaml_config import AddConfig, YamlSchedule, load_yaml, scale_workers

__all__ = [
    "AddConfig",
    "LazySchedule",
    "Schedule",
    "YamlSchedule",
    "load_lazy",
    "load_yaml",
    "rescale",
    "scale_workers",
    "value_of",
]
