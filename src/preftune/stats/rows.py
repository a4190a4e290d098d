"""Rows that statistics are made of: checked, and summed over groups that are independent of one another."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import scipy

from preftune.errors import ConfigError, DataError

Array = np.ndarray[Any, np.dtype[np.float64]]


def sum_by_group(top: Array, bottom: Array, groups: Sequence[Hashable] | None) -> tuple[Array, Array]:
    """Sums of numerators and denominators per group; without groups every row is its own.

    Raises:
        DataError: Groups do not match the rows, or there are fewer than two.
    """
    if groups is None:
        sums, sizes = top, bottom
    else:
        if len(groups) != len(top):
            raise DataError(
                "one group id per row is needed", where="groups", value=len(groups), allowed=f"{len(top)} ids"
            )
        codes: dict[Hashable, int] = {}
        index = np.array([codes.setdefault(group, len(codes)) for group in groups])
        sums = np.asarray(np.bincount(index, weights=top), dtype=np.float64)
        sizes = np.asarray(np.bincount(index, weights=bottom), dtype=np.float64)
    if len(sums) < 2:
        raise DataError(
            "an interval needs at least two independent groups", where="groups", value=len(sums), allowed="2 or more"
        )
    return sums, sizes


def finite_rows(name: str, values: Sequence[float] | Array) -> Array:
    """The values as an array.

    Raises:
        DataError: There are none, or one is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise DataError("a list of numbers is needed", where=name, value=array.shape, allowed="shape (rows,)")
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array))[0])
        raise DataError("not a finite number", where=f"{name}, row {row}", value=float(array[row]))
    return array


def check_level(level: float) -> None:
    """Refuse what is no confidence level.

    Raises:
        ConfigError: It is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ConfigError("not a confidence level", where="level", value=level, allowed="between 0 and 1, such as 0.95")


def normal_quantile(share: float) -> float:
    """Where the normal distribution has this share below it."""
    return float(scipy.special.ndtri(share))
