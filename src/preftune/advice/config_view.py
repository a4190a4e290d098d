"""What the checks of a configuration see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from preftune.advice.case import Case, Setting
from preftune.training.plan import MemoryEstimate, TimeEstimate


@dataclass(frozen=True)
class View:
    """What a check sees.

    Attributes:
        case: The run with its settings as they are.
        advised: Advised settings by name.
        memory: Estimate of :func:`~preftune.training.estimate.estimate_memory`, or ``None``.
        time: Estimate of :func:`~preftune.training.estimate.estimate_time`, or ``None``.
    """

    case: Case
    advised: Mapping[str, Setting]
    memory: MemoryEstimate | None
    time: TimeEstimate | None

    def number(self, name: str) -> float | None:
        """A setting as it is, if it is a number."""
        value = self.case.given.get(name)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
