"""How the threads of one matrix product wait for each other on a CPU.

Between products, OpenMP's threads spin, and where another program keeps a core busy, each of the many small products of
a packed row spins until the slower thread gets its turn: training was seen to lose six sevenths of its speed. Threads
that sleep while they wait lose little. The runtime reads the setting once, when torch is loaded, so it has to be made
before; what the user has set stays.
"""

from __future__ import annotations

import logging
import os
import sys

_VARIABLE = "OMP_WAIT_POLICY"
_told = False

logger = logging.getLogger(__name__)


def wait_passively() -> None:
    """Make threads sleep while they wait, if torch is not loaded yet and the user has not decided."""
    if "torch" not in sys.modules:
        os.environ.setdefault(_VARIABLE, "PASSIVE")


def tell_if_spinning(num_threads: int) -> None:
    """Say once, before a training on the CPU, that threads spin and how to change that.

    Args:
        num_threads: Threads of a matrix product.
    """
    global _told
    if num_threads > 1 and _VARIABLE not in os.environ and not _told:
        logger.warning(
            "torch was loaded before preftune, so that its %d threads spin while they wait: a busy core slows training "
            "down several times; set %s=PASSIVE or import preftune first",
            num_threads,
            _VARIABLE,
        )
        _told = True
