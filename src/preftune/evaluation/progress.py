"""Progress through tokens: a bar in a terminal, elsewhere one line about how long it takes."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm

#: Seconds of work after which the rest can be told, and the least rest that is worth a line.
_SECONDS_SEEN, _SECONDS_WORTH = 2.0, 10.0


class Progress:
    """Counts tokens.

    Args:
        total: Tokens at most.
        description: What is going on.
        show: Whether anybody wants to know.
    """

    def __init__(self, total: int, description: str, show: bool) -> None:
        self._total, self._description = total, description
        self._done = self._skipped = 0
        self._say = show and not sys.stderr.isatty()
        self._started: float | None = None
        self._bar = tqdm(total=total, desc=description, unit="token", disable=None if show else True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.close()

    def skip(self, tokens: int) -> None:
        """Count tokens that were known."""
        self._skipped += tokens
        self._bar.update(tokens)

    def add(self, tokens: int) -> None:
        """Count tokens that were drawn, or that are not needed any more."""
        self._bar.update(tokens)
        now = time.monotonic()
        if self._started is None:
            # Reading the prompts comes before the first token and would spoil the pace.
            self._started = now
            self._skipped += tokens
            return
        self._done += tokens
        if self._say and now - self._started >= _SECONDS_SEEN:
            self._say = False
            rest = (self._total - self._done - self._skipped) * (now - self._started) / max(self._done, 1)
            if rest >= _SECONDS_WORTH:
                print(f"{self._description}: about {_round(rest)} at most", file=sys.stderr, flush=True)


def _round(seconds: float) -> str:
    """Seconds as ``40 s`` or ``3 min``: an estimate has no more digits."""
    return f"{round(seconds, -1):.0f} s" if seconds < 95 else f"{seconds / 60:.0f} min"
