"""A bar in one line that stays legible in narrow terminals: what matters least is left out first."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

#: Columns that a bar has at least, and at most.
_LEAST_BAR, _MOST_BAR = 8, 40


class Bar:
    """One line: what is counted, a bar, the share, the time that is left, and figures as far as they fit.

    Attributes:
        title: What is counted, such as ``step``.
        done: How much of it is done.
        total: How much there is; ``None`` where it is not known yet.
        left: The time that is left, in words; empty where it is not known yet.
        figures: Further texts, the most important first.
    """

    def __init__(self, title: str, total: int | None, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self.left = ""
        self.figures: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay the line out for the width at hand."""
        head, tail = self.texts(options.max_width)
        room = options.max_width - len(head) - len(tail) - 4
        # Filled to its full width, the line would wrap on terminals that count otherwise.
        grid = Table.grid(padding=(0, 2, 0, 0))
        cells = [Text(head, style="bold", no_wrap=True)]
        if room >= _LEAST_BAR:
            grid.add_column()
            bar = ProgressBar(total=self.total or 1, completed=self.done, width=min(room, _MOST_BAR))
            grid.add_row(cells[0], bar, Text(tail, no_wrap=True))
        else:
            grid.add_row(cells[0], Text(tail, no_wrap=True))
        yield grid

    def texts(self, width: int) -> tuple[str, str]:
        """What stands before and behind the bar.

        Args:
            width: Columns of the terminal.
        """
        total = "?" if self.total is None else f"{self.total:,}"
        head = f"{self.title} {self.done:,}/{total}"
        tail = f"left {self.left}" if self.left else ""
        return head, fitting(tail, self.figures, width - len(head) - _LEAST_BAR - 4)


def fitting(line: str, figures: Sequence[str], width: int) -> str:
    """A line with as many figures behind it as fit.

    Args:
        line: Its beginning, which is kept whole.
        figures: Texts, the most important first.
        width: Columns; 0 for no limit.
    """
    for figure in figures:
        longer = f"{line}  {figure}" if line else figure
        if width and len(longer) > width:
            break
        line = longer
    return line


def live(console: Console, *bars: Bar) -> Live:
    """A live display of bars, one line each, that is not yet started."""
    grid = Table.grid()
    for bar in bars:
        grid.add_row(bar)
    return Live(grid, console=console, refresh_per_second=4, redirect_stderr=False)
