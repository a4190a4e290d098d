"""Functions that stay finite, in value and in gradient, where their textbook form overflows."""

from __future__ import annotations

import torch
from torch import Tensor

# Above this exponent exp continues as its tangent. exp(32) = 8e13: even the tangent at an exponent of 1e4, squared as
# IPO does, stays below float32's 3.4e38. A clamp would also be finite, but its zero gradient would drop exactly those
# pairs that are furthest off; the tangent keeps pulling in the right direction.
MAX_EXPONENT = 32.0

# Below this the power score is its limit, log; the relative error of that is |exponent * x| / 2.
_ZERO_EXPONENT = 1e-12


def scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """A number as a tensor of the dtype and device of ``like``, without waiting for the device.

    Args:
        value: A number, which is written on the device instead of copied there, or a tensor.
        like: Tensor whose dtype and device to take.

    Example:
        >>> scalar(0.1, torch.zeros(2, dtype=torch.float64))
        tensor(0.1000, dtype=torch.float64)
    """
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype)
    return torch.full((), float(value), dtype=like.dtype, device=like.device)


def guarded_exp(x: Tensor) -> Tensor:
    """Return exp(x), continued as its tangent above ``MAX_EXPONENT``.

    Args:
        x: Any shape.

    Returns:
        A tensor of the same shape, finite for every finite ``x`` up to 1e24 in float32, with a continuous, positive
        slope.

    Example:
        >>> guarded_exp(torch.tensor([0.0, 1e4])).isfinite().all().item()
        True
    """
    capped = x.clamp(max=MAX_EXPONENT)
    return torch.exp(capped) * (1.0 + (x - capped))


def power_score(x: Tensor, exponent: float) -> Tensor:
    """Return (exp(exponent x) - 1) / exponent, whose limit at exponent 0 is x.

    With x = log t this is (t^exponent - 1) / exponent, the family behind the alpha-divergences and AlphaPO.

    Args:
        x: Any shape, a log-ratio or a log-prob.
        exponent: The power; 0 gives ``x`` itself.

    Returns:
        A tensor of the same shape; beyond ``MAX_EXPONENT`` the tangent, as in ``guarded_exp``.

    Example:
        >>> power_score(torch.tensor([0.5]), 1e-9).item(), round(power_score(torch.tensor([0.5]), 1.0).item(), 4)
        (0.5, 0.6487)
    """
    if abs(exponent) < _ZERO_EXPONENT:
        return x
    scaled = exponent * x
    capped = scaled.clamp(max=MAX_EXPONENT)
    power = torch.exp(capped)
    # expm1 does not cancel for small exponents, where exp(.) - 1 would. Its gradient, taken as value + 1, does for very
    # negative ones, where that of exp does not.
    grown = torch.where(capped.abs() < 1.0, torch.expm1(capped), power - 1.0)
    return (grown + power * (scaled - capped)) / exponent


def log_odds(average_logps: Tensor) -> Tensor:
    """Return log(p / (1 - p)) from log p.

    Args:
        average_logps: Length-normalised log-probs, at most 0. A model that is certain of every token rounds to
            exactly 0, where the odds are infinite; they are capped at one rounding step below 1.

    Returns:
        A tensor of the same shape, in nats.

    Example:
        >>> log_odds(torch.tensor([0.5]).log()).abs().item() < 1e-6
        True
    """
    below_zero = average_logps.clamp(max=-torch.finfo(average_logps.dtype).eps)
    # log(-expm1(x)) = log(1 - p) needs no second branch here: where 1 - p rounds to 1 its error, one rounding step, is
    # nothing beside the x it is subtracted from.
    return below_zero - torch.log(-torch.expm1(below_zero))


def per_token(sums: Tensor, lengths: Tensor) -> Tensor:
    """Divide sums by token counts, where an empty completion counts as one token.

    Args:
        sums: ``(pairs,)`` sums over tokens.
        lengths: ``(pairs,)`` token counts.

    Returns:
        ``(pairs,)`` averages.
    """
    return sums / lengths.clamp(min=1.0)
