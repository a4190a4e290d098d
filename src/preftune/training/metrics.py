"""Metrics that stay on the device until a log line is due."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

#: Sum and weight of one metric over some examples or tokens; their ratio is the metric.
Term = tuple[Tensor | float, Tensor | float]


class MetricSums:
    """Running sums of metrics, reduced over processes once per log line.

    Every metric is a weighted mean: pairs weigh one each in rewards, tokens in the entropy. Means of means, which
    change with the way a batch was split, are not formed.

    Args:
        device: Where the sums are kept.
        derive: Adds metrics that are made of others.
    """

    def __init__(
        self, device: torch.device, derive: Callable[[dict[str, float]], dict[str, float]] = lambda found: found
    ) -> None:
        self._device = device
        self._derive = derive
        self._sums: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Term]) -> None:
        """Add ``{name: (sum, weight)}`` without waiting for the device."""
        for name, (total, weight) in terms.items():
            pair = torch.stack(
                [
                    torch.as_tensor(total, dtype=torch.float64, device=self._device),
                    torch.as_tensor(weight, dtype=torch.float64, device=self._device),
                ]
            )
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def state(self) -> dict[str, Tensor]:
        """The sums so far, ``(2,)`` each: total and weight. They are never changed in place."""
        return dict(self._sums)

    def load_state(self, sums: Mapping[str, Tensor]) -> None:
        """Go on with sums from :meth:`state`."""
        self._sums = {name: pair.to(self._device) for name, pair in sums.items()}

    def pop(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over all processes since the last call; ``reduce`` sums a tensor over them."""
        names = sorted(self._sums)
        if not names:
            return {}
        sums = reduce(torch.stack([self._sums[name] for name in names])).tolist()
        self._sums.clear()
        return self._derive({name: total / weight for name, (total, weight) in zip(names, sums, strict=True) if weight})
