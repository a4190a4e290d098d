"""A conversation in a terminal: two columns that grow, or one answer after the other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from preftune.errors import ConfigError

if TYPE_CHECKING:
    from preftune.chat.session import Answer, Session

#: Narrower terminals show the answers below each other.
_LEAST_WIDTH = 72
_HELP = "/new forgets the conversation, /exit (or Ctrl-D) ends, Ctrl-C stops an answer"


def talk(session: Session, console: Any) -> None:
    """Ask and answer until the end of the input.

    Args:
        session: The conversation.
        console: A Rich console.

    Raises:
        KeyboardInterrupt: Ctrl-C while no answer was being given, or without a terminal.
    """
    interactive = sys.stdin.isatty() and console.is_terminal
    if interactive:
        console.print(_HELP, style="dim")
    for question in _questions(interactive):
        if question in ("/exit", "/quit"):
            return
        if question == "/new":
            session.restart()
            continue
        if question in ("/help", "/?"):
            console.print(_HELP, style="dim")
            continue
        try:
            with closing(session.ask(question)) as answers:
                _show(answers, console, [side.label for side in session.sides], interactive)
        except KeyboardInterrupt:
            if not interactive:
                raise
            console.print("(stopped)", style="dim")
        except ConfigError as error:
            if not interactive:
                raise
            console.print(str(error), style="yellow", markup=False)


def _questions(interactive: bool) -> Iterator[str]:
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  # line editing for input()
    while True:
        try:
            line = input("you> ") if interactive else sys.stdin.readline()
        except EOFError:
            print()
            return
        if not interactive and not line:
            return
        if line.strip():
            yield line.strip()


def _show(answers: Iterator[list[Answer]], console: Any, labels: list[str], interactive: bool) -> None:
    if interactive and len(labels) > 1 and console.width >= _LEAST_WIDTH:
        _side_by_side(answers, console)
    else:
        _one_by_one(answers, labels)


def _side_by_side(answers: Iterator[list[Answer]], console: Any) -> None:
    """Two columns that grow; while they do, no more than a screen of their ends is drawn."""
    from rich.live import Live

    last: list[Answer] = []
    try:
        with Live(console=console, refresh_per_second=8, transient=True) as live:
            for last in answers:
                live.update(_columns(last, console.width, console.height - 4))
    finally:
        # Whole, and also after Ctrl-C.
        if last:
            console.print(_columns(last, console.width, None))


def _columns(answers: list[Answer], width: int, height: int | None) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), expand=True)
    cells = []
    for answer in answers:
        table.add_column(f"{answer.label} ({_state(answer)})", ratio=1, overflow="fold", header_style="bold cyan")
        # Text, not markup: models write square brackets.
        lines = _wrapped(answer.text, width // len(answers) - 2)
        cells.append(Text("\n".join(lines if height is None else lines[-max(height, 1) :])))
    table.add_row(*cells)
    return table


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    lines: list[str] = []
    for line in text.split("\n"):
        lines += textwrap.wrap(line, width, replace_whitespace=False) or [""]
    return lines


def _state(answer: Answer) -> str:
    unit = "token" if answer.num_tokens == 1 else "tokens"
    return f"{answer.num_tokens} {unit}" + ("" if answer.finished else ", not ended")


def _one_by_one(answers: Iterator[list[Answer]], labels: list[str]) -> None:
    """Below each other: the first answer as it comes, the others when it is done."""
    out, shown = sys.stdout, ""
    last: list[Answer] = []
    out.write(f"{labels[0]}> ")
    try:
        for last in answers:
            text = last[0].text
            if text.startswith(shown):
                out.write(text[len(shown) :])
                shown = text
                out.flush()
    finally:
        for number, answer in enumerate(last):
            if number:
                out.write(f"{answer.label}> {answer.text}")
            end = "" if answer.finished else f" [not ended after {answer.num_tokens} tokens]"
            out.write(f"{end}\n")
        if not last:
            out.write("\n")
        out.flush()
