"""``preftune report``: one HTML page about runs and sweeps."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.errors import ConfigError

if TYPE_CHECKING:
    from preftune.report.page import Page

#: The last line of a page, with a digest of all before it.
_SEAL = re.compile(r"<!-- preftune report ([0-9a-f]{64}) -->\n\Z")


def add_parser(subparsers: Any) -> None:
    """Add the verb's arguments."""
    parser = subparsers.add_parser(
        "report",
        description="Write one HTML page, which needs no network, about runs and sweeps: curves, alarms, samples, "
        "evaluation, audit, settings, maps. Several runs are compared on the same axes.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output folder of a run (of TRL too), or folder of a sweep"
    )
    parser.add_argument("--out", default="report.html", metavar="FILE", help="the page (default: report.html)")
    parser.add_argument("--title", help="its heading (default: made from the folders' names)")
    parser.add_argument("--open", action="store_true", help="show it in the browser")


def is_page(path: Path) -> bool:
    """Whether a file is a page that this verb has written, unchanged."""
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, ValueError):
        return False
    found = _SEAL.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def _seal(path: Path) -> None:
    from preftune.files import replace_text

    text = path.read_bytes().decode("utf-8")
    text += "" if text.endswith("\n") else "\n"
    replace_text(path, f"{text}<!-- preftune report {_digest(text)} -->\n")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_page(out: str) -> None:
    """Only a page like this one is replaced."""
    path = Path(out)
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file() or not is_page(path)):
        raise ConfigError(
            "the file is not a report of preftune, and is left as it is",
            where="--out",
            value=out,
            remedy="name another file",
        )


def _told(page: Page) -> list[str]:
    """What the page says first of each run."""
    views = page.runs[: page.num_own]
    told = [f"{view.run.name}: {view.verdict.headline}" if len(views) > 1 else view.verdict.headline for view in views]
    for sweep in page.sweeps:
        told.append(
            f"{sweep.sweep.name}: sweet spot {', '.join(map(' '.join, sweep.best)) or 'unknown'}. {sweep.reason}"
        )
        told += [sweep.doubt] if sweep.doubt else []
    return told


def _next(page: Page) -> list[str]:
    """The commands that come next: of each run, or of a sweep."""
    from preftune.runs.next_steps import command

    commands = [view.verdict.command for view in page.runs[: page.num_own]]
    for sweep in page.sweeps:
        verb, best = sweep.sweep.content.get("verb"), sweep.sweep.path / "best.yaml"
        commands += [command(verb, "--config", best)] if verb and best.is_file() and not sweep.doubt else []
    return [each for each in commands if each]


def run(arguments: argparse.Namespace) -> int:
    """Write the page."""
    from preftune.report import write
    from preftune.terminal.units import size

    arguments.runs = [os.path.expanduser(each) for each in arguments.runs]
    for each in arguments.runs:
        if not os.path.exists(each):
            raise ConfigError("no such folder", where="RUN", value=each, remedy="name the output folder of a run")
    _check_page(arguments.out)
    page, path = write(arguments.runs, arguments.out, title=arguments.title), Path(arguments.out)
    _seal(path)
    print(f"wrote {path} ({size(path.stat().st_size)})")
    for text in _told(page):
        print(text)
    for text in _next(page)[:1]:
        print(f"next: {text}")
    if arguments.open:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            print("no browser could be started; open the file by hand")
    return 0
