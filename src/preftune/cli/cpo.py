"""``preftune cpo``: contrastive preference optimisation and SimPO on pairs, without a reference."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run the verb.

    Args:
        argv: Arguments after the verb.

    Returns:
        The exit code.
    """
    from preftune.runs.run import run

    return run("cpo", argv)
