"""``preftune report``: one HTML page about runs and sweeps."""

from __future__ import annotations

import argparse
from typing import Any


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


def run(arguments: argparse.Namespace) -> int:
    """Write the page."""
    from preftune.cli.style import size
    from preftune.report import build

    path = build(arguments.runs, arguments.out, title=arguments.title)
    print(f"wrote {path} ({size(path.stat().st_size)})")
    if arguments.open:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            print("no browser could be started; open the file by hand")
    return 0
