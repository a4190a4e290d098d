"""Guards: callbacks that say when a preference training goes wrong, with evidence, cause, remedy and source."""

from preftune.training.guards.alarm import Alarm
from preftune.training.guards.panel import Guards, find_guards
from preftune.training.guards.settings import COMMON, GUARD_NAMES, check_guards, parse_guards

__all__ = [
    "COMMON",
    "GUARD_NAMES",
    "Alarm",
    "Guards",
    "check_guards",
    "find_guards",
    "parse_guards",
]
