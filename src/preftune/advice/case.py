"""What is known about a run before it starts, and what an advice is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from preftune.advice.sources import link_of
from preftune.errors import ConfigError, DataError
from preftune.files import parse_json

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Noise:
    """Share of flipped labels, with its interval.

    Attributes:
        estimate: Share in [0, 0.5].
        low: Lower end of the 95 % interval.
        high: Upper end.
        source: Who says so.
    """

    estimate: float
    low: float
    high: float
    source: str = "given"

    def __post_init__(self) -> None:
        for name in ("estimate", "low", "high"):
            value = getattr(self, name)
            if not 0.0 <= value <= 0.5:
                raise ConfigError(
                    "a share of flipped labels lies between 0 and 0.5",
                    where=f"noise ({name})",
                    value=value,
                    allowed="0 to 0.5",
                    remedy="above 0.5 the labels are turned round: exchange chosen and rejected",
                )
        if not self.low <= self.estimate <= self.high:
            raise ConfigError("the interval does not hold the estimate", where="noise", value=(self.low, self.high))

    @property
    def span(self) -> str:
        """The interval in words."""
        return f"{self.low:.0%}" if self.low == self.high else f"{self.low:.0%} to {self.high:.0%}"

    @property
    def agreement(self) -> float:
        """How often two annotators agree who each err at this share, independently: (1 - e)^2 + e^2."""
        return (1 - self.estimate) ** 2 + self.estimate**2


@dataclass(frozen=True)
class Lengths:
    """Tokens per pair before truncation, each ``(pairs,)``.

    Attributes:
        prompt: Tokens of the prompt.
        chosen: Tokens of the chosen completion.
        rejected: Tokens of the rejected completion; zeros for single answers.
        source: How they were found.
    """

    prompt: Counts
    chosen: Counts
    rejected: Counts
    source: str = "counted"

    @property
    def longest(self) -> Counts:
        """The longer of the two sequences of each pair, ``(pairs,)``."""
        longest: Counts = self.prompt + np.maximum(self.chosen, self.rejected)
        return longest

    @property
    def both(self) -> Counts:
        """Tokens of both completions of each pair, ``(pairs,)``."""
        both: Counts = self.chosen + self.rejected
        return both

    def quantile(self, share: float) -> int:
        """Length that this share of the pairs does not exceed."""
        return math.ceil(float(np.quantile(self.longest, share, method="inverted_cdf")))

    def truncated_share(self, max_length: int | None) -> float:
        """Share of the pairs that lose tokens at ``max_length``."""
        return 0.0 if max_length is None else float((self.longest > max_length).mean())

    def cut(self, max_length: int | None) -> Lengths:
        """What ``keep_start`` leaves of the pairs at ``max_length``."""
        if max_length is None:
            return self
        prompt = np.minimum(self.prompt, max_length)
        chosen, rejected = (np.minimum(side, max_length - prompt) for side in (self.chosen, self.rejected))
        return Lengths(prompt, chosen, rejected, self.source)


@dataclass(frozen=True)
class Case:
    """A run that is to be advised on.

    Attributes:
        verb: A verb that learns from preferences, such as ``dpo``.
        methods: Names in the table of methods.
        num_parameters: Of the policy.
        lora: Whether an adapter is trained.
        num_pairs: Training pairs, or single answers.
        num_processes: Processes that share a step.
        lengths: Tokens of the pairs, if known.
        noise: Label noise, if known.
        truncated_share: Share of pairs that ``max_length`` cuts, where it is known without ``lengths``.
        max_positions: Longest sequence that the model was made for, if known.
        given: Settings as they are now, by name.
        explicit: Names that somebody has set; the others are defaults.
        has_test: Whether the data have a test split; ``None`` where no data are known.
    """

    verb: str
    methods: tuple[str, ...]
    num_parameters: int
    lora: bool = False
    num_pairs: int | None = None
    num_processes: int = 1
    lengths: Lengths | None = None
    noise: Noise | None = None
    truncated_share: float | None = None
    max_positions: int | None = None
    given: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    explicit: frozenset[str] = frozenset()
    has_test: bool | None = None

    def __post_init__(self) -> None:
        if self.num_parameters < 1:
            raise ConfigError("not a number of parameters", where="num_parameters", value=self.num_parameters)
        if not self.methods:
            raise ConfigError("no method", where="loss_type", remedy="see `preftune methods`")

    @property
    def method(self) -> str:
        """The first method, whose scale beta has."""
        return self.methods[0]

    @property
    def pairs_per_step(self) -> int | None:
        """Pairs of an optimizer step as the settings are, if they say so."""
        try:
            return (
                int(self.given["per_device_train_batch_size"])
                * int(self.given["gradient_accumulation_steps"])
                * self.num_processes
            )
        except KeyError:
            return None


def size_text(num_parameters: float) -> str:
    """Parameters in words: ``7B parameters``."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if num_parameters >= unit:
            return f"{num_parameters / unit:.3g}{name} parameters"
    return f"{num_parameters:g} parameters"


@dataclass(frozen=True)
class Source:
    """Somebody who says something.

    Attributes:
        name: Paper, recipe, or this project's own measurement.
        says: What, in a few words.
    """

    name: str
    says: str

    @property
    def link(self) -> str:
        """Where it can be read; empty for what nobody printed."""
        return link_of(self.name)


@dataclass(frozen=True)
class Setting:
    """One advised setting.

    Attributes:
        field: Its name.
        value: The advice.
        low: Lower end of what is reasonable, or ``None``.
        high: Upper end, or ``None``.
        reason: Why, in a sentence.
        sources: Who says so.
        kind: ``published``, ``heuristic`` or ``computed``.
        contradiction: Where sources disagree, who says what; else ``None``.
    """

    field: str
    value: Any
    low: float | None
    high: float | None
    reason: str
    sources: tuple[Source, ...]
    kind: str
    contradiction: str | None = None


@dataclass(frozen=True)
class Flag:
    """Something in a configuration that looks risky.

    Attributes:
        severity: ``note``, ``warn`` or ``problem``.
        fields: Settings that it is about.
        title: What is wrong, in a few words.
        detail: The numbers.
        remedy: What to do.
        source: Who says so.
        threshold_kind: ``published``, ``heuristic`` or ``computed``.
        always: Whether it stands though nobody has set those settings.
    """

    severity: str
    fields: tuple[str, ...]
    title: str
    detail: str
    remedy: str
    source: str
    threshold_kind: str
    always: bool = False


def noise_from_audit(path: str | Path) -> Noise | None:
    """The noise estimate of an ``audit.json``.

    Args:
        path: The file that ``preftune data audit`` wrote.

    Returns:
        The estimate, or ``None`` where the audit made none.

    Raises:
        DataError: The file cannot be read as an audit.
    """
    try:
        content = parse_json(Path(path).expanduser().read_text(encoding="utf-8"))
        found = content["noise"]
        if not found or found.get("estimate") is None:
            return None
        estimate = float(found["estimate"])
        low = estimate if found.get("low") is None else float(found["low"])
        high = estimate if found.get("high") is None else float(found["high"])
    except OSError as error:
        raise DataError(f"cannot read the audit ({error.strerror})", where=str(path)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError("not an audit", where=str(path), remedy="write one with `preftune data audit --out`") from error
    if not all(map(math.isfinite, (estimate, low, high))):
        return None
    # Interval ends may lie outside what a share can be; half is the most that labels can be wrong by.
    estimate = min(max(estimate, 0.0), 0.5)
    low, high = min(max(low, 0.0), estimate), max(min(high, 0.5), estimate)
    return Noise(estimate, low, high, f"audit ({found.get('judge') or 'judge not named'})")
