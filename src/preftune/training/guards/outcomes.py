"""Guards of what training leads to: displacement, over-optimisation, length, overfitting."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from preftune.models.sampling import TAIL_LEVEL, has_left
from preftune.stats.clusters import (
    Z95,
    Z999,
    Estimate,
    clustered,
    r_squared,
    separation_influence,
    t_interval,
)
from preftune.training.guards.base import Guard, Reading
from preftune.training.guards.evidence import Array, Generation, HeldOut, Moments, pack, unpack

#: Fewer held-out pairs than these say too little.
MIN_PAIRS = 30
#: At most so many pairs, evenly spread, are remembered from one evaluation to the next: a checkpoint keeps them.
KEPT_PAIRS = 1000


def kept(values: Array) -> Array:
    """The values of the pairs that are remembered, ``(min(P, KEPT_PAIRS),)``."""
    if len(values) <= KEPT_PAIRS:
        return values
    places: Array = np.linspace(0, len(values) - 1, KEPT_PAIRS)
    return values[places.astype(np.int64)]


def log_ratios(memory: dict[str, Any], heldout: HeldOut) -> tuple[Array, Array] | None:
    """Log-ratios of chosen and rejected answers, ``(pairs,)`` each, of the pairs that are remembered.

    Without a reference the first evaluation stands in for it, which therefore says nothing itself.
    """
    chosen, rejected = kept(heldout.column("chosen")), kept(heldout.column("rejected"))
    if heldout.has_reference:
        return chosen, rejected
    if memory.get("pairs") != heldout.fingerprint:
        memory.update(pairs=heldout.fingerprint, chosen=pack(chosen), rejected=pack(rejected))
        return None
    return chosen - unpack(memory["chosen"]), rejected - unpack(memory["rejected"])


class LikelihoodDisplacement(Guard):
    """Chosen answers become less likely than under the reference, while the margin over the rejected ones grows.

    By the source's definition any fall counts. But a policy that moves away from the reference at all loses on answers
    that were not sampled from it, and healthy runs end a few hundredths of a nat per token below. A fall therefore has
    to exceed a quarter of a nat per token (a fifth of each token's probability) with its 99.9 % interval, which is a
    heuristic, while the gap to the rejected answers is positive with its own. Methods without a reference are
    compared with their first evaluation.
    """

    name = "likelihood_displacement"
    needs = "heldout"
    cause = "both answers of a pair are alike, or the update is large: probability moves to answers outside the data"
    remedy = (
        "add a supervised term (loss_type sigmoid with sft), take dpop or a larger beta, lower learning_rate, or drop "
        "pairs whose answers hardly differ"
    )
    source = "2410.08847 (the sign; its size is a heuristic)"

    #: Nats per token of a chosen answer.
    threshold, over = 0.25, 0.15

    def on_heldout(self, heldout: HeldOut) -> Reading | None:
        """Compare with the reference."""
        ratios = log_ratios(self.memory, heldout) if len(heldout.values) >= MIN_PAIRS else None
        if ratios is None:
            return None
        groups = kept(heldout.groups.astype(np.float64))
        chosen, gap = clustered(ratios[0], groups), self._gap(ratios, groups)
        tokens = float(np.nanmean(heldout.column("chosen_length")))
        return Reading(
            firing=chosen.high() < -self.threshold * tokens and gap.low() > 0,
            clear=chosen.mean > -self.over * tokens or gap.mean <= 0,
            message=(
                f"held-out chosen answers lost {-chosen.mean:.2f} nats against the reference "
                f"(99.9 % interval {-chosen.high():.2f} to {-chosen.low():.2f}) over {tokens:.0f} tokens, while they "
                f"gained {gap.mean:.2f} on the rejected ones"
            ),
            evidence={**chosen.evidence("chosen_logratio"), **gap.evidence("gap"), "tokens": tokens},
        )

    @staticmethod
    def _gap(ratios: tuple[Array, Array], groups: Array) -> Estimate:
        """Mean difference of the log-ratios; of single answers, the difference of the two means."""
        paired = ratios[0] - ratios[1]
        if np.isfinite(paired).any():
            return clustered(paired, groups)
        wanted, other = clustered(ratios[0], groups), clustered(ratios[1], groups)
        return Estimate(wanted.mean - other.mean, math.hypot(wanted.error, other.error), wanted.num + other.num)


class _Best:
    """The held-out margins at their best so far, for comparison pair by pair."""

    def __init__(self, memory: dict[str, Any], heldout: HeldOut) -> None:
        self._memory = memory
        self._margins = kept(heldout.column("margin"))
        self._groups = kept(heldout.groups.astype(np.float64))
        self._pairs = heldout.fingerprint
        if memory.get("pairs") != self._pairs:
            memory.clear()
            memory["pairs"] = self._pairs

    def change(self) -> tuple[float, float, Estimate] | None:
        """Separation then and now, and the change with its error; ``None`` before there is anything to compare."""
        if "margins" not in self._memory:
            return None
        before = unpack(self._memory["margins"])
        then, old = separation_influence(before)
        now, new = separation_influence(self._margins)
        error = clustered(new - old, self._groups).error
        return then, now, Estimate(now - then, error, len(before))

    def accuracies(self) -> tuple[float, float]:
        """Share of pairs ranked rightly, then and now."""
        return float((unpack(self._memory["margins"]) > 0).mean()), float((self._margins > 0).mean())

    def keep_if_better(self, **beside: Any) -> None:
        """Remember this evaluation where it separates the pairs best."""
        now = separation_influence(self._margins)[0]
        # Before the first step all margins are rounding errors, and their separation means nothing.
        if float(np.abs(self._margins).mean()) > 1e-4 and now > self._memory.get("separation", -math.inf):
            self._memory.update(separation=now, margins=pack(self._margins), **beside)


class Overfitting(Guard):
    """Training margins grow while held-out pairs are told apart less well than before, or no better by far.

    Held-out quality is the separation d = mean / standard deviation of the margins (for normal margins the accuracy is
    Phi(d)): it falls when accuracy does, and is known better. It is compared with its best value so far on the same
    pairs; the 99.9 % interval of the change has to lie below zero and the fall to be at least a tenth. The training
    margin since the last evaluation has to exceed the one at that best point with its 95 % interval. It fires as well
    where held-out quality merely stands still (no gain beyond its 95 % interval) while the accuracy on training pairs
    exceeds the held-out one by 0.20 with its 99.9 % interval. The numbers are heuristics.
    """

    name = "overfitting"
    needs = "heldout"
    cause = "the policy learns the training pairs by heart: too many epochs, or noisy labels"
    remedy = "train fewer epochs (1 to 2 for noisy data), keep the best checkpoint (load_best_model_at_end), raise beta"
    source = "the definition of overfitting"

    share, over, split = 0.10, 0.05, 0.20

    def on_heldout(self, heldout: HeldOut) -> Reading | None:
        """Compare with the best evaluation so far."""
        if len(heldout.values) < MIN_PAIRS or not np.isfinite(heldout.column("margin")).all():
            return None
        best = _Best(self.memory, heldout)
        change, train = best.change(), heldout.train
        correct = clustered((np.sign(heldout.column("margin")) + 1) / 2, heldout.groups)
        gap = train.mean("correct") - correct.mean
        gap_low = gap - Z999 * math.hypot(train.standard_error("correct"), correct.error)
        reading = None
        if change is not None and train.num >= 2 and train.is_finite:
            then, now, difference = change
            before = Moments.from_list(self.memory["train"])
            growth = train.mean("margin") - before.mean("margin")
            error = math.hypot(train.standard_error("margin"), before.standard_error("margin"))
            accuracy = best.accuracies()
            fell = difference.high() < 0 and now < (1 - self.share) * then
            apart = gap_low > self.split and difference.low(Z95) <= 0
            reading = Reading(
                firing=growth - Z95 * error > 0 and (fell or apart),
                clear=growth < 0 or (now > (1 - self.over) * then and gap < 0.75 * self.split),
                message=(
                    f"the training margin grew from {before.mean('margin'):.2f} to {train.mean('margin'):.2f} "
                    f"(accuracy {train.mean('correct'):.2f}), while held-out separation went from {then:.2f} to "
                    f"{now:.2f} (accuracy {accuracy[0]:.2f} to {accuracy[1]:.2f})"
                ),
                evidence={
                    **difference.evidence("separation_change"),
                    "separation_best": then,
                    "separation_now": now,
                    "accuracy_gap": gap,
                    "accuracy_gap_low": gap_low,
                    "accuracy_best": accuracy[0],
                    "accuracy_now": accuracy[1],
                    "train_margin_best": before.mean("margin"),
                    "train_margin_now": train.mean("margin"),
                    "best_step": float(self.memory["step"]),
                },
            )
        if train.num >= 2 and train.is_finite:
            best.keep_if_better(train=train.as_list(), step=heldout.step)
        return reading


class OverOptimisation(Guard):
    """The policy moves on, away from the reference, and has nothing to show for it.

    Against sqrt(KL), true quality rises, peaks and falls, while the rewards that are optimised go on rising. Here the
    KL is that of samples of the policy, and quality the held-out separation of pairs (see :class:`Overfitting`), a
    proxy. Fires where the KL exceeds, with its 95 % interval, the one at the best evaluation, and quality has fallen
    since, with its 99.9 % interval; or where the KL alone is wide beyond a budget in nats per token; or where the
    samples hold far more of the reference's far tail than its own texts would (see :func:`preftune.models.sampling.
    has_left`), with their 99.9 % interval.
    """

    name = "over_optimisation"
    needs = "generations"
    cause = "the policy is optimised past the point where the preference data say anything about its answers"
    remedy = "stop earlier, raise beta, or lower learning_rate; judge by samples.jsonl, not by rewards"
    source = "2406.02900, 2210.10760 (the shape)"

    #: Nats per token beyond which answers have left the reference's language: exp(1) = 2.7 alternatives a token.
    budget, over = 1.0, 0.8

    def on_generation(self, generation: Generation) -> Reading | None:
        """The samples alone: how far they are, and whether the reference could have written them."""
        if not np.isfinite(generation.log_ratios).all():
            return None
        kl, tokens = t_interval(generation.log_ratios), float(generation.lengths.mean())
        tail = t_interval(generation.tail_shares)
        foreign = has_left(tail.mean, tail.low())
        message = f"KL to the reference is {kl.mean:.1f} nats over {tokens:.0f} tokens a sample"
        if foreign:
            level = f"{100 * TAIL_LEVEL:.0f} %"
            message += f", {100 * tail.mean:.1f} % of them among the {level} it is least likely to write"
        return Reading(
            firing=kl.low(Z95) > self.budget * tokens or foreign,
            clear=kl.mean < self.over * self.budget * tokens and tail.mean < TAIL_LEVEL,
            message=message,
            evidence={
                **kl.evidence("kl", Z95),
                **tail.evidence("tail_share"),
                "sqrt_kl": math.sqrt(max(kl.mean, 0.0)),
                "tokens": tokens,
            },
        )

    def on_heldout(self, heldout: HeldOut) -> Reading | None:
        """Quality against the KL."""
        if heldout.generation is None or len(heldout.values) < MIN_PAIRS:
            return None
        if not np.isfinite(heldout.column("margin")).all() or not np.isfinite(heldout.generation.log_ratios).all():
            return None
        kl = t_interval(heldout.generation.log_ratios)
        best = _Best(self.memory, heldout)
        change, reading = best.change(), None
        if change is not None:
            then, now, difference = change
            before = Estimate(*self.memory["kl"])
            reading = Reading(
                firing=kl.low(Z95) > before.high(Z95) and difference.high() < 0 and now < 0.9 * then,
                clear=now > 0.95 * then,
                message=(
                    f"sqrt(KL) grew from {_root(before.mean):.2f} to {_root(kl.mean):.2f}, while held-out separation "
                    f"fell from {then:.2f} to {now:.2f}"
                ),
                evidence={
                    **kl.evidence("kl", Z95),
                    "kl_best": before.mean,
                    "separation_best": then,
                    "separation_now": now,
                    **difference.evidence("separation_change"),
                },
            )
        best.keep_if_better(kl=[kl.mean, kl.error, kl.num])
        return reading


class LengthExploitation(Guard):
    """The implicit reward is mostly length, or the policy's answers grow beyond those it should learn from.

    Held-out: log-ratios of all answers are regressed on their token counts. A rising line with R^2 above 0.30, the low
    end of its 95 % interval included, is what the source finds in models that exploit length; here at two evaluations
    in a row, since the very first updates may change little more than where answers end; the interval and the two in a
    row are this project's. Samples: mean length exceeds
    that of the chosen answers to the same prompts by half, and its own at the start, each with the whole 99.9 %
    interval; that is a heuristic.
    """

    name = "length_exploitation"
    needs = "heldout"
    cause = "longer answers win in the data, and the policy learns length instead of quality"
    remedy = "use a length-normalised method (sigmoid_norm, simpo) or ld_alpha, or balance the lengths of the pairs"
    source = (
        "2403.19159 for the 0.30 (it finds R^2 of 0.30 to 0.46 out of distribution); its interval, and two evaluations "
        "in a row, are this project's"
    )

    threshold, over, longer = 0.30, 0.25, 0.50

    def on_heldout(self, heldout: HeldOut) -> Reading | None:
        """Regression of log-ratios on length."""
        ratios = log_ratios(self.memory, heldout) if len(heldout.values) >= MIN_PAIRS else None
        if ratios is None:
            return None
        lengths = [kept(heldout.column(f"{kind}_length")) for kind in ("chosen", "rejected")]
        x, y = np.concatenate(lengths), np.concatenate(ratios)
        known = np.isfinite(x) & np.isfinite(y)
        r2, slope, low = r_squared(x[known], y[known])
        holds = slope > 0 and low > self.threshold
        held, self.memory["held"] = self.memory.get("held", False), holds
        return Reading(
            firing=holds and held,
            clear=slope <= 0 or r2 < self.over,
            message=f"length explains {100 * r2:.0f} % of held-out log-ratios' variance ({slope:+.3f} nats a token)",
            evidence={"r_squared": r2, "r_squared_low": low, "slope": slope, "answers": float(known.sum())},
        )

    def on_generation(self, generation: Generation) -> Reading | None:
        """Lengths of samples."""
        start = self.memory.setdefault("lengths", pack(generation.lengths))
        excess = t_interval(generation.lengths - (1 + self.longer) * generation.chosen_lengths)
        first = unpack(start)
        if excess.num < 2 or len(first) != len(generation.lengths):
            return None
        growth = t_interval(generation.lengths - first)
        chosen = float(np.nanmean(generation.chosen_lengths))
        unfinished = 1 - float(generation.finished.mean())
        return Reading(
            firing=excess.low() > 0 and growth.low() > 0,
            clear=excess.mean < 0,
            message=(
                f"samples have {generation.lengths.mean():.0f} tokens, {growth.mean:.0f} more than at the start; "
                f"chosen answers have {chosen:.0f}"
            ),
            evidence={
                "length": float(generation.lengths.mean()),
                "chosen_length": chosen,
                **growth.evidence("growth"),
                **excess.evidence("excess_over_150_percent"),
            },
            cause="answers no longer come to an end" if unfinished > 0.5 else None,
            remedy="lower learning_rate or raise beta" if unfinished > 0.5 else None,
            source="2403.19159 (the direction)",
        )


def _root(value: float) -> float:
    return math.sqrt(max(value, 0.0))


__all__ = [
    "KEPT_PAIRS",
    "MIN_PAIRS",
    "Z999",
    "LengthExploitation",
    "LikelihoodDisplacement",
    "OverOptimisation",
    "Overfitting",
]
