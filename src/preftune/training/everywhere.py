"""What every process of an evaluation has to know alike, also one whose share of the data is empty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from preftune.training.metrics import MetricSums


def agree_on_names(sums: MetricSums, processes: int) -> None:
    """Enter the metrics that other processes have, with no weight: sums are exchanged as one tensor."""
    if processes > 1:
        for names in gathered(sorted(sums.state())):
            sums.add(dict.fromkeys(names, (0.0, 0.0)))


def in_order(predictions: Sequence[Tensor], processes: int) -> npt.NDArray[Any] | None:
    """Predictions of all processes, in the order of the data.

    Args:
        predictions: Those of this process, one tensor per batch; shares may differ in length.
        processes: Number of processes; the ``n``-th example went to the ``n``-th of them, counted round and round.

    Returns:
        One array, or ``None`` where nothing was predicted.
    """
    mine = np.concatenate([each.cpu().numpy() for each in predictions]) if predictions else None
    parts = [part for part in (gathered(mine) if processes > 1 else [mine]) if part is not None]
    if not parts:
        return None
    places = np.concatenate([np.arange(len(part)) for part in parts])
    # Equal places keep the order of the processes.
    joined: npt.NDArray[Any] = np.concatenate(parts)[np.argsort(places, kind="stable")]
    return joined


def gathered(value: Any) -> list[Any]:
    """What every process has, in their order."""
    from accelerate.utils import gather_object

    found: list[Any] = gather_object([value])
    return found
