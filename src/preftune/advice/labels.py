"""How far labels can be trusted, from an estimate of the share that is flipped."""

from __future__ import annotations

from preftune.advice.case import Noise

#: Notes: noisy is where annotators agree on 50 to 60 % of the pairs.
NOISY_AGREEMENT = 0.6
#: Share of flipped labels up to which data are called clean; heuristic.
CLEAN = 0.1
#: Labels are called noisy at all only where the interval's low end is above this share; heuristic.
SURE_NOISE = 0.05


def label_state(noise: Noise | None) -> str:
    """``noisy``, ``mixed``, ``clean`` or ``unknown``.

    Noisy is an agreement of two independent annotators of at most 60 %, as in the notes: a share of flipped labels of
    27.6 % or more.
    """
    if noise is None:
        return "unknown"
    if noise.agreement <= NOISY_AGREEMENT:
        return "noisy"
    return "clean" if noise.estimate < CLEAN else "mixed"


def surely_noisy(noise: Noise | None) -> bool:
    """Whether flipped labels can be told from none."""
    return noise is not None and noise.low > SURE_NOISE
