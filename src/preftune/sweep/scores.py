"""Held-out figures of a trial with their intervals, and the per-pair numbers that trials are compared by."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from preftune.errors import DataError
from preftune.evaluation.sampling import has_left
from preftune.stats.intervals import bootstrap_mean, proportion_interval

Array = np.ndarray[Any, np.dtype[np.float64]]

FILE_NAME = "held_out.npz"
ACCURACY, MARGIN = "eval_rewards/accuracies", "eval_rewards/margins"
#: Margins grow with beta by definition; divided by it they can be compared between cells.
PLAIN_MARGIN = "eval_rewards/margins_over_beta"
#: How much more than the reference the policy prefers the chosen answer, in nats per token; see `HeldOut.values`.
PER_TOKEN = "eval_rewards/margins_per_token"
#: The same with a charge for leaving the reference, for where no samples tell; see `HeldOut.values`.
GAIN = "eval_preference_gain"
#: Exponent of the importance weights in the preference gain.
SMOOTHING = 0.5
#: Of a trial's own samples: divergence from the reference, and the share of tokens from the reference's far tail.
KL, TAIL = "eval_kl", "eval_tail_share"
#: The share of tokens that the reference itself would have drawn from its far tail in the same places.
OWN_TAIL = "eval_tail_share_of_reference"
#: Metrics that have a number per held-out pair.
PAIRED = (ACCURACY, MARGIN, PLAIN_MARGIN, PER_TOKEN, GAIN)
#: Whether less is better.
LOWER_IS_BETTER = ("eval_loss", "train_loss", KL, TAIL)


@dataclass(frozen=True)
class HeldOut:
    """Rewards of the held-out pairs under one trial.

    Attributes:
        rewards: ``(pairs, 2)``, chosen and rejected.
        lengths: Tokens of the answers, ``(pairs, 2)``.
        prompts: Which pairs answer the same prompt, ``(pairs,)``.
        beta: What the rewards are multiplied by.
        digest: Of the held-out tokens: only trials that agree on it saw the same pairs.
    """

    rewards: Array
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    prompts: np.ndarray[Any, np.dtype[np.int64]]
    beta: float
    digest: str

    def values(self, metric: str) -> Array:
        """One number per pair, ``(pairs,)``, for a metric of :data:`PAIRED`.

        With r the sequence's log-ratio of policy to reference (reward over beta), the margin per token is
        ``r_w / |y_w| - r_l / |y_l|``. It can be compared across betas, and long answers count as much as short ones.

        The preference gain is ``s(r_w / 2) - s(r_l / 2)``, s the logistic function and r the sequence's log-ratio of
        policy to reference. It is 0 for the reference itself and grows as the policy writes the preferred completions
        more and the others less. ``2 s(r)`` would be the importance weight of policy against an even mixture of policy
        and reference (the balance heuristic, Veach and Guibas 1995): where the policy leaves what the reference
        writes, both terms vanish, so that over-optimisation shows, to which accuracy and margin are blind. With the
        whole r it is too strict: it counts as lost whatever held-out texts cannot vouch for, and prefers policies that
        hardly moved. Half of it, a square root of the weights, is exponential smoothing (Aouali, Brunel, Rohde and
        Korba 2023, ICML), which trades bias for variance; the exponent 1/2 is a choice, see docs/sweep.md.
        """
        gap = self.rewards[:, 0] - self.rewards[:, 1]
        if metric == ACCURACY:
            # As the trainer counts: a tie is lost.
            return np.asarray(gap > 0, dtype=np.float64)
        if metric == PER_TOKEN:
            rates = self.rewards / self.beta / np.maximum(self.lengths, 1)
            return np.asarray(rates[:, 0] - rates[:, 1], dtype=np.float64)
        if metric == GAIN:
            shares = special.expit(SMOOTHING * self.rewards / self.beta)
            return np.asarray(shares[:, 0] - shares[:, 1], dtype=np.float64)
        return np.asarray(gap / (self.beta if metric == PLAIN_MARGIN else 1.0), dtype=np.float64)

    def with_rewards(self, rewards: Any) -> HeldOut:
        """The same pairs, evaluated once more."""
        return replace(self, rewards=np.asarray(rewards, dtype=np.float64))

    def means(self) -> dict[str, float]:
        """The mean of every metric of :data:`PAIRED`."""
        return {name: float(self.values(name).mean()) for name in PAIRED}

    def save(self, folder: Path) -> None:
        """Write to a run folder."""
        np.savez_compressed(
            folder / FILE_NAME,
            rewards=self.rewards,
            lengths=self.lengths,
            prompts=self.prompts,
            beta=self.beta,
            digest=np.array(self.digest),
        )

    @classmethod
    def load(cls, folder: Path) -> HeldOut | None:
        """Read from a run folder; ``None`` where there is nothing readable."""
        with (
            contextlib.suppress(OSError, ValueError, KeyError),
            np.load(folder / FILE_NAME, allow_pickle=False) as kept,
        ):
            return cls(kept["rewards"], kept["lengths"], kept["prompts"], float(kept["beta"]), str(kept["digest"]))
        return None


def held_out_of(rewards: Any, dataset: Any, beta: float) -> HeldOut:
    """Gather what was evaluated.

    Args:
        rewards: ``(pairs, 2)``.
        dataset: The tokenised held-out pairs, in the same order.
        beta: Of the trial.
    """
    codes: dict[bytes, int] = {}
    digest = hashlib.sha256()
    prompts, lengths = [], []
    columns = dataset.with_format(None)
    for row in columns.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]):
        prompt = np.asarray(row["prompt_ids"], dtype=np.int32).tobytes()
        prompts.append(codes.setdefault(prompt, len(codes)))
        lengths.append([len(row["chosen_ids"]), len(row["rejected_ids"])])
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            ids = np.asarray(row[name], dtype=np.int32)
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    return HeldOut(
        np.asarray(rewards, dtype=np.float64),
        np.asarray(lengths),
        np.asarray(prompts),
        float(beta or 1.0),
        digest.hexdigest(),
    )


#: A trial has left the reference where its share of the far tail is surely at least this many times the reference's
#: own; heuristic, see docs/sweep.md.
LEFT_FACTOR = 2.0
#: Samples below which nothing is concluded; heuristic.
LEAST_SAMPLES = 8


def left_reference(metrics: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a trial's own samples hold far more of the reference's far tail than the reference itself would write.

    An effect of some size, and not chance: the low end of the share's interval is at least :data:`LEFT_FACTOR` times
    the reference's own share in the same places. A trained policy is never the reference, so that a test for any
    difference would rule out every trial with samples enough. A few samples, and an interval without width, show
    nothing. Where the own share is not known (results of earlier versions), its upper bound decides, see
    :func:`preftune.models.sampling.has_left`.

    What such a policy writes is nothing that the preferences were about; its held-out figures do not speak for it.
    """
    found, own = metrics.get(TAIL, {}), metrics.get(OWN_TAIL, {}).get("mean")
    mean, low, high = (found.get(name) for name in ("mean", "low", "high"))
    if mean is None or low is None or high is None or int(found.get("n") or 0) < LEAST_SAMPLES:
        return False
    if float(high) <= float(low):
        return False
    if own is not None:
        return float(low) > 0 and float(low) >= LEFT_FACTOR * float(own)
    return has_left(float(mean), float(low))


def figure(mean: Any, low: float | None = None, high: float | None = None, n: int = 0) -> dict[str, Any]:
    """One entry of ``metrics``; what is not finite is ``None``."""
    finite = [float(x) if isinstance(x, (int, float)) and math.isfinite(x) else None for x in (mean, low, high)]
    return {"mean": finite[0], "low": finite[1], "high": finite[2], "n": int(n)}


def with_interval(
    values: Array, groups: Sequence[int] | np.ndarray[Any, Any], seed: int, *, outcome: bool = False
) -> dict[str, Any]:
    """Mean with a 95 % bootstrap interval over prompts; no interval where there are fewer than two prompts.

    Of outcomes, yes and no, the interval is Wilson's where prompts do not differ: a bootstrap would be certain.
    """
    if len(values) == 0 or not np.isfinite(values).all():
        return figure(float("nan"), n=len(values))
    try:
        found = bootstrap_mean(values, groups=list(groups), seed=seed)
        if outcome and found.standard_error <= 1e-12:
            found = proportion_interval(values, groups=list(groups))
    except DataError:
        return figure(float(values.mean()), n=len(values))
    return figure(found.mean, found.low, found.high, len(values))


def metrics_of(results: Mapping[str, Any], held: HeldOut | None, seed: int) -> dict[str, dict[str, Any]]:
    """All figures of a trial.

    Args:
        results: What training and the final evaluation returned.
        held: The held-out pairs, if they were evaluated.
        seed: Of the bootstrap; the same for all trials.

    Returns:
        ``{name: {"mean", "low", "high", "n"}}``: training loss, held-out loss, accuracy and margin.
    """
    found = {}
    if "train_loss" in results:
        found["train_loss"] = figure(results["train_loss"])
    if held is None:
        return found
    number = len(held.prompts)
    for name in ("eval_loss", "eval_rewards/chosen", "eval_rewards/rejected", "eval_entropy"):
        if name in results:
            found[name] = figure(results[name], n=number)
    for name in PAIRED:
        found[name] = with_interval(held.values(name), held.prompts, seed, outcome=name == ACCURACY)
    for name in (ACCURACY, MARGIN):
        # The trainer's own mean, to the last digit; the bootstrap sums in another order.
        if name in results:
            found[name] |= {"mean": figure(results[name])["mean"]}
    return found
