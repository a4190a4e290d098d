"""Settings with reasons: what is published, what follows from the data, and what in a configuration looks risky.

The entry point is :func:`~preftune.advice.advisor.advise`, which turns a :class:`~preftune.advice.case.Case` (what is
known about a run) into an :class:`~preftune.advice.advisor.Advice`. Published numbers live in tables
(:mod:`~preftune.advice.published`), rules of thumb in :mod:`~preftune.advice.rules`, checks in
:mod:`~preftune.advice.flags`, memory and time in :mod:`~preftune.advice.memory` and :mod:`~preftune.advice.clock`.
"""

from __future__ import annotations

from preftune.advice.advisor import Advice, advise
from preftune.advice.case import Case, Lengths, Noise

__all__ = ["Advice", "Case", "Lengths", "Noise", "advise"]
