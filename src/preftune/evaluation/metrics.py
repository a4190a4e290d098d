"""Numbers about pairs with their intervals: accuracy, margins, calibration, and the same by length and source.

A pair is ranked right if its chosen answer has the strictly higher reward; ties count as wrong, as in RewardBench
(2403.13787, section 3). All intervals are over prompts: pairs that share one are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np

from preftune.errors import DataError
from preftune.stats.intervals import bootstrap_mean, paired_proportion_interval, proportion_interval
from preftune.stats.rows import Array

Groups = Sequence[Hashable] | None
Metric = dict[str, float]
Kind = Literal["outcome", "number", "share", "change"]


def summarise(
    values: Any,
    groups: Groups = None,
    *,
    kind: Kind = "number",
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Metric:
    """Mean and interval of one number per row.

    Args:
        values: ``(rows,)``.
        groups: One group id per row.
        kind: ``outcome`` for values in [0, 1] (Wilson's interval over groups), ``number`` for any others (studentised
            bootstrap over groups), ``share`` for shares in [0, 1] (the bootstrap, or Wilson's interval where all are
            alike, of which a bootstrap would be certain), ``change`` for differences of two outcomes (Tango's interval
            over groups).
        level: Nominal coverage.
        num_resamples: Bootstrap resamples.
        seed: Of the resampling.

    Returns:
        ``mean``, ``low``, ``high``, and ``n``, the number of rows. With fewer than two groups there is no interval, and
        its ends are NaN; without rows the mean is too.
    """
    rows = np.asarray(values, dtype=np.float64)
    num_groups = len(rows) if groups is None else len(set(groups))
    if num_groups < 2:
        return {
            "mean": float(rows.mean()) if len(rows) else math.nan,
            "low": math.nan,
            "high": math.nan,
            "n": len(rows),
        }
    if kind == "outcome" or (kind == "share" and np.ptp(rows) <= 1e-12):
        found = proportion_interval(rows, groups=groups, level=level)
    elif kind == "change":
        found = paired_proportion_interval(rows, groups=groups, level=level)
    else:
        found = bootstrap_mean(
            rows, groups=groups, level=level, num_resamples=num_resamples, method="student", seed=seed
        )
    return {"mean": found.mean, "low": found.low, "high": found.high, "n": len(rows)}


class Summary:
    """:func:`summarise` with its settings filled in.

    Args:
        level: Nominal coverage.
        num_resamples: Bootstrap resamples.
        seed: Of the resampling.
    """

    def __init__(self, level: float = 0.95, num_resamples: int = 2000, seed: int = 0) -> None:
        self.level, self.num_resamples, self.seed = level, num_resamples, seed

    def outcome(self, values: Any, groups: Groups) -> Metric:
        """Of values in [0, 1]."""
        return summarise(values, groups, kind="outcome", level=self.level)

    def change(self, values: Any, groups: Groups) -> Metric:
        """Of differences of two outcomes, -1, 0 or 1."""
        return summarise(values, groups, kind="change", level=self.level)

    def number(self, values: Any, groups: Groups, kind: Kind = "number") -> Metric:
        """Of any numbers."""
        return summarise(values, groups, kind=kind, level=self.level, num_resamples=self.num_resamples, seed=self.seed)

    def share(self, values: Any, groups: Groups) -> Metric:
        """Of shares in [0, 1] that are no yes and no."""
        found = self.number(values, groups, "share")
        # Student's interval knows no bounds; a share has two.
        return {**found, "low": max(found["low"], 0.0), "high": min(found["high"], 1.0)}


def ranked_right(rewards: Array) -> Array:
    """1 where chosen has the strictly higher reward, else 0; ``(pairs, 2)`` to ``(pairs,)``."""
    return np.asarray(rewards[:, 0] > rewards[:, 1], dtype=np.float64)


def reward_metrics(rewards: Array, groups: Groups, summary: Summary, prefix: str = "rewards") -> dict[str, Metric]:
    """Accuracy, margin and both rewards.

    Args:
        rewards: ``(pairs, 2)``, chosen and rejected.
        groups: Prompt of each pair.
        summary: Settings of the intervals.
        prefix: First part of the names.

    Returns:
        Metric by name, such as ``rewards/accuracies``.
    """
    return {
        f"{prefix}/accuracies": summary.outcome(ranked_right(rewards), groups),
        f"{prefix}/margins": summary.number(rewards[:, 0] - rewards[:, 1], groups),
        f"{prefix}/chosen": summary.number(rewards[:, 0], groups),
        f"{prefix}/rejected": summary.number(rewards[:, 1], groups),
        f"{prefix}/ties": summary.outcome(np.asarray(rewards[:, 0] == rewards[:, 1], dtype=np.float64), groups),
    }


def calibration(rewards: Array, groups: Groups, summary: Summary, num_bins: int = 10) -> dict[str, Any]:
    """How far ``p = sigmoid(reward_chosen - reward_rejected)`` can be believed as a probability.

    Which answer stands first is arbitrary, so a pair is read as a forecast of its likelier answer: confidence
    ``max(p, 1 - p)`` in [0.5, 1], right or wrong, a tie half right. Then

    * ``ECE = sum_b n_b / n * |accuracy_b - confidence_b|`` over bins of equal width,
    * ``Brier = mean (1 - p)^2``, 0.25 for someone who always says one half,
    * log loss ``= mean -log p``, the loss of DPO itself on these pairs; log 2 for one half.

    Args:
        rewards: ``(pairs, 2)``, chosen and rejected.
        groups: Prompt of each pair.
        summary: Settings of the intervals.
        num_bins: Bins.

    Returns:
        ``bins`` with ``low``, ``high``, ``n``, ``confidence`` and ``accuracy``; ``ece``, a number, because it is biased
        upwards by the scatter within bins and resampling doubles that; ``brier``, ``log_loss`` and ``overconfidence``
        (mean confidence minus accuracy) with intervals.

    Source:
        Guo et al. (2017), 1706.04599, eq. 3, for the ECE; Brier (1950).
    """
    margins = rewards[:, 0] - rewards[:, 1]
    # Stable for any margin: exp never overflows, and 1 - p keeps its digits where p is next to 1.
    wrong = np.exp(-np.logaddexp(0.0, margins))
    confidence = np.exp(-np.logaddexp(0.0, -np.abs(margins)))
    right = (np.sign(margins) + 1) / 2
    edges = np.linspace(0.5, 1.0, num_bins + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, num_bins - 1)
    bins: list[dict[str, Any]] = []
    ece = 0.0
    for number in range(num_bins):
        inside: list[int] = np.flatnonzero(index == number).tolist()
        accuracy = summary.outcome(right[inside], None if groups is None else [groups[i] for i in inside])
        mean = float(confidence[inside].mean()) if len(inside) else math.nan
        if len(inside):
            ece += len(inside) / len(margins) * abs(accuracy["mean"] - mean)
        bins.append(
            {
                "low": float(edges[number]),
                "high": float(edges[number + 1]),
                "n": len(inside),
                "confidence": mean,
                "accuracy": accuracy,
            }
        )
    return {
        "bins": bins,
        "ece": ece,
        "brier": summary.number(wrong**2, groups),
        "log_loss": summary.number(np.logaddexp(0.0, -margins), groups),
        "overconfidence": summary.number(confidence - right, groups),
    }


def by_length(
    rewards: Array, lengths: Any, groups: Groups, summary: Summary, num_buckets: int = 4
) -> list[dict[str, Any]]:
    """Accuracy where the chosen answer is the longer or the shorter one, and by the length of both together.

    Args:
        rewards: ``(pairs, 2)``.
        lengths: Completion tokens, ``(pairs, 2)``.
        groups: Prompt of each pair.
        summary: Settings of the intervals.
        num_buckets: Buckets of the mean length, of about equal size; equal lengths are never parted.

    Returns:
        One entry per bucket: ``kind`` (``longer`` or ``tokens``), ``name``, ``n``, ``accuracy`` and ``margin``; empty
        buckets are left out.
    """
    sizes = np.asarray(lengths)
    difference = sizes[:, 0] - sizes[:, 1]
    buckets: list[tuple[str, str, Any]] = [
        ("longer", "chosen is longer", difference > 0),
        ("longer", "equal length", difference == 0),
        ("longer", "rejected is longer", difference < 0),
    ]
    mean = sizes.mean(axis=1)
    edges = np.unique(np.quantile(mean, np.linspace(0, 1, num_buckets + 1)))
    index = np.clip(np.searchsorted(edges, mean, side="right") - 1, 0, max(len(edges) - 2, 0))
    for number in range(max(len(edges) - 1, 1)):
        inside = index == number
        if inside.any():
            name = f"{mean[inside].min():.0f}-{mean[inside].max():.0f} tokens"
            buckets.append(("tokens", name, inside))
    return [
        {"kind": kind, "name": name} | _part(rewards, mask, groups, summary)
        for kind, name, mask in buckets
        if mask.any()
    ]


def by_source(rewards: Array, sources: Sequence[str] | None, groups: Groups, summary: Summary) -> list[dict[str, Any]]:
    """Accuracy per source, in alphabetical order.

    Args:
        rewards: ``(pairs, 2)``.
        sources: Source of each pair, or ``None``.
        groups: Prompt of each pair.
        summary: Settings of the intervals.

    Returns:
        One entry per source: ``name``, ``n``, ``accuracy``, ``margin``.
    """
    if sources is None:
        return []
    names = np.asarray(sources)
    return [{"name": str(name)} | _part(rewards, names == name, groups, summary) for name in np.unique(names)]


def _part(rewards: Array, mask: Any, groups: Groups, summary: Summary) -> dict[str, Any]:
    rows: list[int] = np.flatnonzero(mask).tolist()
    some = None if groups is None else [groups[i] for i in rows]
    part = rewards[rows]
    return {
        "n": len(rows),
        "accuracy": summary.outcome(ranked_right(part), some),
        "margin": summary.number(part[:, 0] - part[:, 1], some),
    }


def preference_metrics(rewards: Any, groups: Groups = None, *, level: float = 0.95, seed: int = 0) -> dict[str, float]:
    """What ``preftune eval`` says about rewards, as flat numbers: a ``compute_metrics`` for the trainers.

    Args:
        rewards: ``(pairs, 2)``, rewards of the chosen and the rejected answer, or the ``EvalPrediction`` with them.
        groups: Prompt of each pair, where several share one; pass it with ``functools.partial``.
        level: Nominal coverage.
        seed: Of the resampling.

    Returns:
        ``accuracy``, ``margin``, ``brier`` and ``log_loss``, each also with ``_low`` and ``_high``, and ``ece``.

    Raises:
        DataError: Not rewards of pairs.

    >>> found = preference_metrics([[1.0, 0.0], [0.5, 0.2], [0.1, 0.3], [0.9, 0.1]])
    >>> found["accuracy"]
    0.75
    """
    given = getattr(rewards, "predictions", rewards)
    values = np.asarray(given, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != 2 or not len(values):
        raise DataError(
            "rewards of chosen and rejected answers are needed",
            where="predictions",
            value=values.shape,
            allowed="shape (pairs, 2)",
        )
    if not np.isfinite(values).all():
        raise DataError("a reward that is not finite", where=f"pair {int(np.argwhere(~np.isfinite(values))[0, 0])}")
    summary = Summary(level, seed=seed)
    about = calibration(values, groups, summary)
    metrics = {
        "accuracy": summary.outcome(ranked_right(values), groups),
        "margin": summary.number(values[:, 0] - values[:, 1], groups),
        "brier": about["brier"],
        "log_loss": about["log_loss"],
    }
    return flat(metrics) | {"ece": about["ece"]}


def flat(metrics: dict[str, Metric]) -> dict[str, float]:
    """``{name: {mean, low, high}}`` as ``{name, name_low, name_high}``, without ends that do not exist."""
    out: dict[str, float] = {}
    for name, metric in metrics.items():
        out[name] = metric["mean"]
        out |= {f"{name}_{end}": metric[end] for end in ("low", "high") if math.isfinite(metric[end])}
    return out
