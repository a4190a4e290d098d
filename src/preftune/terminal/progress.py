"""Progress through long work: a bar in a terminal, elsewhere a line about how long it takes, and one now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm

#: Seconds of work after which the rest can be told, and the least rest that is worth a line.
_SECONDS_SEEN, _SECONDS_WORTH = 2.0, 10.0
#: Seconds between further lines.
_SECONDS_BETWEEN = 60.0


class Progress:
    """Counts pieces of work.

    Args:
        total: Pieces at most.
        description: What is going on.
        show: Whether anybody wants to know.
        unit: What a piece is called.
    """

    def __init__(self, total: int, description: str, show: bool, unit: str = "token") -> None:
        self._total, self._description = total, description
        self._done = self._skipped = 0
        self._say = show and not sys.stderr.isatty()
        self._started: float | None = None
        self._next = _SECONDS_SEEN
        self._bar = tqdm(total=total, desc=description, unit=unit, disable=None if show else True, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.close()

    def skip(self, number: int) -> None:
        """Count what was known."""
        self._skipped += number
        self._bar.update(number)

    def reach(self, number: int) -> None:
        """Count what others did, up to a number in all."""
        self.add(max(number - self._done - self._skipped, 0))

    def add(self, number: int) -> None:
        """Count what was done, or what is not needed any more."""
        number = min(number, self._total - self._done - self._skipped)
        self._bar.update(number)
        now = time.monotonic()
        if self._started is None:
            # Reading the prompts comes before the first token and would spoil the pace.
            self._started = now
            self._skipped += number
            return
        self._done += number
        passed = now - self._started
        if not self._say or passed < self._next:
            return
        first, self._next = self._next == _SECONDS_SEEN, passed + _SECONDS_BETWEEN
        counted = self._done + self._skipped
        rest = (self._total - counted) * passed / max(self._done, 1)
        if rest >= _SECONDS_WORTH:
            share = f"{100 * counted / self._total:.0f} %"
            text = f"about {_round(rest)} at most" if first else f"{share}, about {_round(rest)} left"
            print(f"{self._description}: {text}", file=sys.stderr, flush=True)


def _round(seconds: float) -> str:
    """Seconds as ``40 s`` or ``3 min``: an estimate has no more digits."""
    return f"{round(seconds, -1):.0f} s" if seconds < 95 else f"{seconds / 60:.0f} min"
