"""The grid that is searched where nobody names fields: beta and learning rate around what has been published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preftune.errors import ConfigError
from preftune.objectives.lookup import find_method
from preftune.objectives.spec import MethodSpec
from preftune.sweep.space import Dimension

#: Half a decade to either side: three values then span the published range of most methods (beta 0.03 to 0.3).
SPREAD = (0.3, 1.0, 3.0)
#: Adapters take about ten times the rate of full fine-tuning (alignment-handbook, zephyr-7b-beta: 5e-7 and 5e-6).
ADAPTER_FACTOR = 10.0
_FALLBACK_RATE = 1e-6


@dataclass(frozen=True)
class Proposal:
    """A grid with the reason for each of its fields.

    Attributes:
        dimensions: What is searched.
        reasons: One line per field.
    """

    dimensions: tuple[Dimension, ...]
    reasons: tuple[str, ...]


def propose(
    loss_type: Sequence[str],
    given: Mapping[str, Any],
    *,
    adapter: bool,
    advised: Mapping[str, tuple[float, str]] | None = None,
) -> Proposal:
    """A 3x3 grid of beta and learning rate on the scale of the method.

    Args:
        loss_type: The run's losses; the first decides, since it gives beta its scale.
        given: ``beta`` and ``learning_rate`` where the user set them: they become the middle.
        adapter: Whether an adapter is trained instead of the whole model.
        advised: Value and reason by name, for this very model; they go before what is published.

    Returns:
        The grid: a third and three times the middle value, rounded to two digits.

    Raises:
        ConfigError: The method is unknown or has no beta to search.
    """
    spec = find_method(loss_type[0])
    known = advised or {}
    if "beta" not in {*spec.defaults, *known, *given}:
        raise ConfigError(
            f"nothing published says which beta {spec.name} takes", remedy="name the fields: --param beta=...,..."
        )
    middles = []
    for name, factor in (("beta", 1.0), ("learning_rate", ADAPTER_FACTOR if adapter else 1.0)):
        if name in given:
            middles.append((float(given[name]), "as the settings say"))
        elif name in known:
            middles.append(known[name])
        else:
            value, reason = _published(name, spec)
            told = f"{reason}, ten times that for an adapter" if factor > 1 else reason
            middles.append((value * factor, told))
    (beta, beta_reason), (rate, rate_reason) = middles
    return Proposal(
        (Dimension("beta", _around(beta)), Dimension("learning_rate", _around(rate))),
        (f"beta around {beta:g}: {beta_reason}", f"learning_rate around {rate:g}: {rate_reason}"),
    )


def _published(name: str, spec: MethodSpec) -> tuple[float, str]:
    if name in spec.defaults:
        return float(spec.defaults[name]), f"published ({spec.defaults_source})"
    return _FALLBACK_RATE, "nothing published for this method; that of DPO (arXiv:2305.18290, appendix B)"


def _around(middle: float) -> tuple[float, ...]:
    return tuple(float(f"{middle * factor:.2g}") for factor in SPREAD)
