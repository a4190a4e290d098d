"""Metrics that stay on the device until a log line is due."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from preftune.kernels.device import wide_dtype

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
        self._sums: dict[str, Term] = {}

    def add(self, terms: Mapping[str, Term]) -> None:
        """Add ``{name: (sum, weight)}``. Numbers stay on the host, tensors on the device: neither waits for it."""
        for name, (total, weight) in terms.items():
            before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (before[0] + self._summand(total), before[1] + self._summand(weight))

    def state(self) -> dict[str, Term]:
        """The sums so far: total and weight. They are never changed in place."""
        return dict(self._sums)

    def load_state(self, sums: Mapping[str, Term]) -> None:
        """Go on with sums from :meth:`state`."""
        self._sums = {name: (self._summand(total), self._summand(weight)) for name, (total, weight) in sums.items()}

    def _summand(self, value: Tensor | float) -> Tensor | float:
        if not isinstance(value, Tensor):
            return float(value)
        return value.detach().to(self._device, wide_dtype(self._device))

    def pop(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over all processes since the last call; ``reduce`` sums a tensor over them."""
        names = sorted(self._sums)
        if not names:
            return {}
        numbers = [number for name in names for number in self._sums[name]]
        whole = wide_dtype(self._device)
        tensors = [n if isinstance(n, Tensor) else torch.full((), n, dtype=whole, device=self._device) for n in numbers]
        sums = reduce(torch.stack(tensors).view(-1, 2)).tolist()
        self._sums.clear()
        return self._derive({name: total / weight for name, (total, weight) in zip(names, sums, strict=True) if weight})
