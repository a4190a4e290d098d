"""How a learning rate depends on the size of the model: a rule of thumb between published and measured anchors."""

from __future__ import annotations

import math

from preftune.advice.published import USUAL_SIZE

#: Parameters of the demo's model, and the peak rate at which nearly every method learns with it (docs/learning.md).
TOY_SIZE = 5e5
TOY_RATE = 2.5e-4
#: Tulu 3 (2411.15124) takes 5e-7 at 8B and 2e-7 at 70B: log(5e-7 / 2e-7) / log(70 / 8).
LARGE_EXPONENT = math.log(2.5) / math.log(70 / 8)
LARGEST = 70e9
#: Sizes within this factor are the same size: 6.7 and 8.0 billion parameters are two names for one step of the ladder.
SAME_SIZE = 1.25
#: Recipes of still larger models are taken as of this size where they are carried down: between the two, published
#: rates do not rise.
LARGE_SIZE = 8e9
#: An adapter takes ten times the rate of all weights: alignment-handbook zephyr-7b-beta (5e-7 and 5e-6).
ADAPTER_FACTOR = 10.0
#: No adapter was measured at toy size, where ten times the rate would come near that of training from scratch.
MOST = 1e-3


def rate_at_size(rate: float, num_parameters: float, published_at: float = USUAL_SIZE) -> float:
    """Carry a learning rate from the size that it was published for to another.

    Below that size, log rate is linear in log size between the published point and the toy anchor; beyond the anchor
    nothing is extrapolated, and models above 8B count as of 8B. Above it, the rate falls as size to the power -0.42, up
    to 70B. Both are heuristics: they pass through numbers that were published or measured, and nothing says that they
    hold in between.

    Args:
        rate: Learning rate for all weights.
        num_parameters: Size of the model at hand.
        published_at: Size of the model that ``rate`` is for.

    Returns:
        The rate at that size.

    Example:
        >>> f"{rate_at_size(1e-6, 7e9):.1e} {rate_at_size(1e-6, 5e5):.1e} {rate_at_size(5e-7, 70e9, 8e9):.1e}"
        '1.0e-06 2.5e-04 2.0e-07'
    """
    if max(num_parameters / published_at, published_at / num_parameters) <= SAME_SIZE:
        return rate
    if num_parameters >= published_at:
        larger = max(1.0, min(num_parameters, LARGEST) / published_at)
        return float(rate * larger**-LARGE_EXPONENT)
    published_at = min(published_at, LARGE_SIZE)
    if published_at <= TOY_SIZE or num_parameters * SAME_SIZE >= published_at:
        return rate
    done = math.log(published_at / num_parameters) / math.log(published_at / TOY_SIZE)
    done = min(done, 1.0)
    return math.exp((1 - done) * math.log(rate) + done * math.log(max(rate, TOY_RATE)))


def two_digits(value: float) -> float:
    """The number with two significant digits: more would pretend to a precision that no rule has.

    >>> two_digits(0.000123456)
    0.00012
    """
    return float(f"{value:.1e}")
