"""The outcome of an evaluation, as an object, as ``eval.json`` and as flat numbers for trackers."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from preftune.errors import SetupError
from preftune.evaluation.metrics import Metric, flat
from preftune.files import finite
from preftune.ownership import put_json

FILE_NAME = "eval.json"
_CHANCE = 0.5


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


@dataclass
class EvalResult:
    """What was found.

    Attributes:
        model: Name of the model.
        ref_model: Name of the reference, or ``None``.
        dataset: Name of the data.
        num_pairs: Pairs that were evaluated.
        num_prompts: Different prompts among them; intervals are over these.
        reward: What a reward is here, as a formula.
        beta: Its factor.
        metrics: ``{name: {mean, low, high, n}}``.
        calibration: See :func:`preftune.evaluation.metrics.calibration`; empty where rewards are no log-odds.
        by_length: See :func:`preftune.evaluation.metrics.by_length`.
        by_source: Accuracy per source.
        kl: KL to the reference on the model's own samples; empty without a reference or samples.
        tail_share: Share of the samples' tokens in the reference's far tail; empty as ``kl`` is.
        lengths: Lengths of the data's answers and of the samples.
        samples: A few prompts with the completions of both models.
        compare: Paired comparison with another checkpoint, or ``None``.
        judge: Win rate in a judge's eyes, or ``None``.
        rewardbench: Scores by RewardBench's rules, or ``None``.
        level: Nominal coverage of the intervals.
        seed: Of samples and resampling.
        notes: Lines for the user.
        seconds: Time by part.
        settings: All settings, secrets excepted.
    """

    model: str
    ref_model: str | None
    dataset: str
    num_pairs: int
    num_prompts: int
    reward: str
    beta: float
    metrics: dict[str, Metric]
    calibration: dict[str, Any] = field(default_factory=dict)
    by_length: list[dict[str, Any]] = field(default_factory=list)
    by_source: list[dict[str, Any]] = field(default_factory=list)
    kl: dict[str, Any] = field(default_factory=dict)
    tail_share: dict[str, Any] = field(default_factory=dict)
    lengths: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    compare: dict[str, Any] | None = None
    judge: dict[str, Any] | None = None
    rewardbench: dict[str, Any] | None = None
    level: float = 0.95
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; numbers that do not exist are ``None``."""
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        cleaned: dict[str, Any] = finite({"preftune": metadata.version("preftune"), **content})
        return cleaned

    def judgement(self) -> str:
        """What the pairs say about the model, in one sentence."""
        found = self.metrics.get("rewards/accuracies")
        if found is None:
            return "Cannot be judged: without a reference, it is not known where the model began."
        mean, low, high = (float(found[name]) for name in ("mean", "low", "high"))
        pairs = f"{self.num_pairs:,} pair{'' if self.num_pairs == 1 else 's'}"
        told = f"it ranks {_percent(mean)} of {pairs} right"
        if not math.isfinite(low):
            return f"Not settled: {told}; there are too few prompts for an interval."
        told += f" ({_percent(self.level, 0)} interval {100 * low:.1f} to {_percent(high)})"
        before = "its reference" if self.ref_model is not None else "chance"
        if low > _CHANCE:
            return f"Looks better than {before}: {told}."
        ties = float((self.metrics.get("rewards/ties") or {}).get("mean") or 0.0)
        if high < _CHANCE and ties:
            return f"Not settled: {told}, and {_percent(ties)} are ties, which count as wrong."
        if high < _CHANCE:
            return f"Looks worse than {before}: {told}."
        return f"Cannot be told from {before}: {told}, which includes half; more pairs narrow it."

    def flat(self) -> dict[str, float]:
        """Metrics as ``name``, ``name_low``, ``name_high``: what trackers get, without a prefix."""
        out = flat(self.metrics)
        if self.calibration:
            out |= flat({name: self.calibration[name] for name in ("brier", "log_loss")})
            out["ece"] = self.calibration["ece"]
        if self.kl:
            out |= flat({"kl": self.kl, "tail_share": self.tail_share})
        if self.judge is not None:
            out |= flat({name: self.judge[name] for name in ("win_rate", "length_controlled")})
            if self.judge.get("corrected"):
                out |= flat({"win_rate_corrected": self.judge["corrected"]})
        return {name: value for name, value in out.items() if math.isfinite(value)}

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``eval.json`` in one step, so that a crash leaves the old file or the new one.

        Args:
            folder: Made where it is missing.

        Returns:
            Path of the file.

        Raises:
            SetupError: It cannot be written.
        """
        path = Path(folder) / FILE_NAME
        try:
            put_json(path, self.as_dict(), indent=1)
        except OSError as error:
            raise SetupError(f"cannot write ({error.strerror})", where=str(path), remedy="set another out") from error
        return path
