"""``preftune demo``: the controlled experiment, generated and trained on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Hand the arguments to the demo, and end with the page about it."""
    from preftune.demo.run import main as run_demo

    return int(run_demo(list(argv), _page) or 0)


def _page(out: Path) -> None:
    """Write the page. A demo that is done must not fail because of a page."""
    from preftune.errors import PreftuneError
    from preftune.report import build

    try:
        print(f"wrote {build([out], out / 'report.html')}")
    except PreftuneError as error:
        print(f"the report could not be written: {error}")
