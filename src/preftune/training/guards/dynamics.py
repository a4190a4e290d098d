"""Guards of the training itself: reward jumps, gradient spikes, falling entropy, numbers that are none."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from preftune.stats.clusters import Z95, t_interval
from preftune.training.guards.base import Guard, Reading, ThresholdKind
from preftune.training.guards.evidence import Generation, HeldOut, Moments, Window


class RewardJump(Guard):
    """A reward metric improves by more than 10 points from one stretch of training to the next.

    Users' practice is *more than 10 % within one epoch*. Taken literally it fires on every run that learns: the
    policy starts out as the reference, where accuracy is a coin toss and every margin 0, and both have to rise. What
    tells a rate that is too high from learning is suddenness. Stretches of at least ``min_pairs`` pairs are compared
    with the one before, at most an epoch apart, in two measures: the accuracy, and the implied preference
    ``mean sigma(margin)``, which is 1/2 where training starts and has no noise there. One of them has to rise by more
    than 0.10 with the whole 95 % interval of the difference.
    """

    name = "reward_jump"
    cause = "the learning rate is too high, or beta too low: the policy chases the reward"
    remedy = "lower learning_rate (to a third), or raise beta; more warmup_steps help where it happens at the start"
    source = (
        "users' practice for the 10 points, more than 10 % improvement of the reward metric within one epoch; the "
        "window of 128 pairs in place of the epoch and the interval are this project's"
    )

    #: Rise of a share that counts as a jump, and below which an episode is over.
    threshold, over = 0.10, 0.05
    min_pairs = 128
    _LABELS: ClassVar[dict[str, str]] = {"implied": "implied preference", "correct": "reward accuracy"}

    def on_window(self, window: Window) -> Reading | None:
        """Compare the stretch that ends here with the one before."""
        if not window.pairs.is_finite:
            return None
        current = Moments.from_list(self.memory.get("current", Moments().as_list())) + window.pairs
        if current.num < self.min_pairs:
            self.memory["current"] = current.as_list()
            return None
        before, at = self.memory.get("previous"), self.memory.get("epoch", 0.0)
        self.memory.update(previous=current.as_list(), epoch=window.epoch, current=Moments().as_list())
        if before is None or window.epoch - at > 1.0:
            return None
        return self._compare(Moments.from_list(before), current)

    def _compare(self, before: Moments, now: Moments) -> Reading:
        rises = {}
        for measure in self._LABELS:
            rise = now.mean(measure) - before.mean(measure)
            error = math.hypot(now.standard_error(measure), before.standard_error(measure))
            rises[measure] = (rise, rise - Z95 * error, rise + Z95 * error)
        worst = max(rises, key=lambda measure: rises[measure][1])
        rise, low, high = rises[worst]
        start, end = before.mean(worst), now.mean(worst)
        return Reading(
            firing=low > self.threshold,
            clear=all(each[0] < self.over for each in rises.values()),
            message=f"{self._LABELS[worst]} rose from {start:.2f} to {end:.2f} within {before.num + now.num:.0f} pairs",
            evidence={
                "measure": self._LABELS[worst],
                "before": start,
                "after": end,
                "rise": rise,
                "rise_low": low,
                "rise_high": high,
                "pairs": before.num + now.num,
            },
        )


class EntropyCollapse(Guard):
    """The policy's entropy per token falls below half of where it started.

    Two estimates, each against its own beginning: the token entropy on the training completions (mean of the last
    ``num_lines`` log lines against the first ones), and ``-log pi`` per token of the policy's own samples, with its
    whole interval. The source gives the direction; one half is a heuristic.
    """

    name = "entropy_collapse"
    cause = (
        "the policy narrows down to a few answers: too high a rate, too many epochs, or data with too little variety"
    )
    remedy = "lower learning_rate or num_train_epochs, raise beta, or look at samples.jsonl for repeated answers"
    source = "2410.11677 (the direction)"

    share, over, num_lines = 0.5, 0.6, 3

    def on_window(self, window: Window) -> Reading | None:
        """Entropy on the training data's completions."""
        entropy = window.logs.get("entropy")
        if entropy is None or not math.isfinite(entropy):
            return None
        first: list[float] = self.memory.setdefault("first", [])
        if len(first) < self.num_lines:
            first.append(entropy)
            return None
        last = [*self.memory.get("last", []), entropy][-self.num_lines :]
        self.memory["last"] = last
        if len(last) < self.num_lines:
            return None
        return self._reading(sum(last) / len(last), None, sum(first) / len(first), "on the data's completions")

    def on_generation(self, generation: Generation) -> Reading | None:
        """Entropy of the policy's samples."""
        estimate = t_interval(generation.entropy)
        start = self.memory.setdefault("samples", estimate.mean)
        return self._reading(estimate.mean, estimate.high(), start, "of its own samples")

    def _reading(self, now: float, high: float | None, start: float, where: str) -> Reading | None:
        # Both estimates share one episode, so that neither may end what the other has begun.
        firing = (now if high is None else high) < self.share * start
        low: dict[str, bool] = self.memory.setdefault("low", {})
        low[where] = firing or (low.get(where, False) and now < self.over * start)
        return Reading(
            firing=firing,
            clear=not any(low.values()),
            message=f"token entropy {where} fell from {start:.2f} to {now:.2f} nats",
            evidence={"start": start, "now": now, "share": now / start if start else math.nan, "measured": where},
        )


class GradientSpike(Guard):
    """One step's gradient norm, before clipping, leaves the range of the steps before it.

    A spike is above ten times the median of the last ``history`` steps, and above the median by eight times their
    spread on the log scale (1.4826 times the median absolute deviation), so that runs with naturally unsteady
    gradients stay quiet. Both numbers are heuristics.
    """

    name = "gradient_spike"
    cause = "an outlier in the data (very long, garbled or mislabelled), or the beginning of a divergence"
    remedy = "look at the rows of that step; keep max_grad_norm at 1 or below; lower learning_rate if it returns"
    source = "experience with large-model training: spikes come before divergence"

    factor, spread, history, at_least = 10.0, 8.0, 50, 10

    def on_window(self, window: Window) -> Reading | None:
        """Look at every step since the last line."""
        recent: list[float] = self.memory.setdefault("norms", [])
        spikes: list[tuple[int, float, float]] = []
        for place, norm in enumerate(window.grad_norms):
            if not math.isfinite(norm) or norm <= 0:
                continue
            if len(recent) >= self.at_least:
                logs = np.log(recent)
                median = float(np.median(logs))
                deviation = 1.4826 * float(np.median(np.abs(logs - median)))
                if math.log(norm) > median + max(math.log(self.factor), self.spread * deviation):
                    spikes.append((window.step - len(window.grad_norms) + 1 + place, norm, math.exp(median)))
            recent.append(norm)
            del recent[: -self.history]
        if not spikes:
            return Reading(False, True) if window.grad_norms else None
        step, norm, usual = max(spikes, key=lambda spike: spike[1])
        return Reading(
            firing=True,
            clear=False,
            message=f"gradient norm {norm:.3g} in step {step}, {norm / usual:.0f} times the usual {usual:.3g}",
            evidence={"spike_step": float(step), "norm": norm, "median": usual, "ratio": norm / usual},
        )


class NonFinite(Guard):
    """Something that is logged is not a finite number: loss, gradient norm, rewards, log-probs."""

    name = "non_finite"
    cause = "overflow in half precision, a rate that is too high, or a damaged row"
    remedy = "train in bf16 or fp32 instead of fp16, lower learning_rate, and look at the rows of that step"
    source = "IEEE 754: no later step mends a weight that is not a number"
    threshold_kind: ClassVar[ThresholdKind] = "published"

    def on_window(self, window: Window) -> Reading | None:
        """The training line, the gradient of every step and the rewards of every pair."""
        steps = [
            window.step - len(window.grad_norms) + 1 + place
            for place, norm in enumerate(window.grad_norms)
            if not math.isfinite(norm)
        ]
        names = self._bad(window.logs)
        if steps:
            names = [*(name for name in names if name != "grad_norm"), f"gradient norm of step {steps[0]}"]
        if not window.pairs.is_finite and not any(name.startswith("rewards/") for name in names):
            names.append("rewards")
        return self._reading(names, {"steps": float(len(steps))} if steps else {})

    def on_heldout(self, heldout: HeldOut) -> Reading | None:
        """The evaluation's line."""
        return self._reading(self._bad(heldout.logs), {})

    def on_generation(self, generation: Generation) -> Reading | None:
        """Log-ratios of samples."""
        bad = int((~np.isfinite(generation.log_ratios)).sum())
        return self._reading(["log-ratios of samples"] if bad else [], {"samples": float(bad)} if bad else {})

    @staticmethod
    def _bad(logs: object) -> list[str]:
        assert hasattr(logs, "items")
        return [name for name, value in logs.items() if isinstance(value, float) and not math.isfinite(value)]

    @staticmethod
    def _reading(names: list[str], evidence: dict[str, float | str]) -> Reading:
        return Reading(
            firing=bool(names),
            clear=not names,
            message=f"not a finite number: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}",
            evidence={"values": ", ".join(names), **evidence},
        )
