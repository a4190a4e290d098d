"""``preftune demo``: the controlled experiment, generated and trained on the spot."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Hand the arguments to the demo."""
    from preftune.demo.run import main as run_demo

    return int(run_demo(list(argv)) or 0)
