"""What a guard is: a condition on the evidence, told once per episode, with cause, remedy and source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from preftune.training.guards.evidence import Generation, HeldOut, Window

Evidence = Window | HeldOut | Generation
ThresholdKind = Literal["published", "heuristic"]


@dataclass(frozen=True)
class Reading:
    """What a guard makes of one piece of evidence.

    Attributes:
        firing: Whether the condition holds.
        clear: Whether it is so far from holding that an episode is over; between the two nothing changes.
        message: What was seen, one sentence with its figures.
        evidence: The figures by name.
        cause: Likely cause, where it depends on what was seen.
        remedy: The same for the remedy.
        source: What it rests on, likewise.
    """

    firing: bool
    clear: bool
    message: str = ""
    evidence: dict[str, float | str] = field(default_factory=dict)
    cause: str | None = None
    remedy: str | None = None
    source: str | None = None


class Guard:
    """Base of the guards.

    A guard speaks once per episode: it fires when its condition first holds, and not again before a reading was clear.
    ``memory`` holds plain JSON values and is all that a guard remembers, so that a resumed run goes on as if it had not
    been interrupted.
    """

    #: As in the ``guards`` setting.
    name: ClassVar[str]
    #: What it needs beside the training log: ``""``, ``"heldout"`` or ``"generations"``.
    needs: ClassVar[str] = ""
    cause: ClassVar[str]
    remedy: ClassVar[str]
    source: ClassVar[str]
    threshold_kind: ClassVar[ThresholdKind] = "heuristic"

    def __init__(self) -> None:
        self.raised = False
        self.memory: dict[str, Any] = {}

    def on_window(self, window: Window) -> Reading | None:
        """Read a window of training; ``None`` says nothing either way."""
        return None

    def on_heldout(self, heldout: HeldOut) -> Reading | None:
        """Read an evaluation."""
        return None

    def on_generation(self, generation: Generation) -> Reading | None:
        """Read samples of the policy."""
        return None

    def observe(self, evidence: Evidence) -> Reading | None:
        """The reading that begins an episode, or ``None``."""
        if isinstance(evidence, Window):
            reading = self.on_window(evidence)
        elif isinstance(evidence, HeldOut):
            reading = self.on_heldout(evidence)
        else:
            reading = self.on_generation(evidence)
        if reading is None:
            return None
        begins = reading.firing and not self.raised
        if reading.firing:
            self.raised = True
        elif reading.clear:
            self.raised = False
        return reading if begins else None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"raised": self.raised, "memory": self.memory}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.raised, self.memory = bool(state["raised"]), dict(state["memory"])
