"""What hostile input led to, counted."""

from __future__ import annotations

import contextlib
import io
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class WrongError(Exception):
    """A number, or an arrangement of tokens, differs from what an independent computation says."""


@dataclass
class Tally:
    """What one kind of input led to.

    Attributes:
        inputs: Rows, files, pairs or command lines that were fed.
        accepted: Of these, those that were worked on.
        refused: Those that ended in a foreseen error.
        tracebacks: Other exceptions; a user would see a traceback.
        long_errors: Foreseen errors of more than one line.
        silent_drops: Rows that were neither kept nor accounted for.
        wrong: Results that an independent computation contradicts.
        examples: The first that went wrong.
        note: Anything else to be said.
    """

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    tracebacks: int = 0
    long_errors: int = 0
    silent_drops: int = 0
    wrong: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)
    note: str = ""

    @property
    def num_bad(self) -> int:
        """How many outcomes should not be."""
        return self.tracebacks + self.long_errors + self.silent_drops + self.wrong

    def attempt(self, what: Any, action: Callable[[], int | None], weight: int = 1) -> None:
        """Run ``action``, which returns the number of rows that vanished, and file its outcome."""
        from preftune.errors import PreftuneError

        self.inputs += weight
        try:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                lost = action() or 0
        except PreftuneError as error:
            self.refused += weight
            if "\n" in str(error).strip():
                self.long_errors += 1
                self._keep(what, f"error of several lines: {error}")
        except WrongError as error:
            self.wrong += 1
            self._keep(what, str(error))
        except Exception:
            self.tracebacks += 1
            self._keep(what, traceback.format_exc(limit=-4))
        else:
            self.accepted += weight
            if lost:
                self.silent_drops += lost
                self._keep(what, f"{lost} rows vanished")

    def _keep(self, what: Any, outcome: str) -> None:
        if len(self.examples) < 20:
            self.examples.append({"input": repr(what)[:2000], "outcome": outcome})
