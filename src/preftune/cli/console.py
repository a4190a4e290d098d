"""What a verb prints beside its results: warnings of the libraries as one line each."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TextIO

from rich.console import Console

from preftune.bars import hidden_bars
from preftune.config.secrets import redact
from preftune.errors import printable


@contextmanager
def plain_warnings(console: Console) -> Iterator[None]:
    """Show warnings as one line each, none of the libraries' notes to developers, and bars in a terminal alone."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, (DeprecationWarning, FutureWarning)) and not console.quiet:
            # Warnings quote files, addresses and answers of others.
            said = printable(str(redact(str(message))))
            Console(stderr=True).print(f"preftune: warning: {said}", markup=False, highlight=False, soft_wrap=True)

    # A bar in a file is one long line.
    bars = nullcontext() if sys.stderr.isatty() else hidden_bars(of_transformers=False)
    with warnings.catch_warnings(), bars:
        warnings.showwarning = show
        yield
