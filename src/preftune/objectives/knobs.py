"""The settings that losses take, each with its default, its range and its meaning."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from preftune.errors import ConfigError


@dataclass(frozen=True)
class Knob:
    """One keyword-only setting of a loss.

    Attributes:
        name: Keyword, as in the configuration.
        default: Value when the user says nothing.
        description: What it does, one sentence.
        kind: ``number``, ``flag`` or ``choice``.
        low: Smallest number allowed.
        high: Largest number allowed.
        low_open: Whether ``low`` itself is refused.
        high_open: Whether ``high`` itself is refused.
        choices: Words allowed, for ``choice``.
        remedy: What to do when a value is refused.
        neutral: Value that changes nothing where no method takes the knob; the default unless another is given. A copy
            with another default keeps it.
        in_function: Whether the loss function takes it as a keyword; otherwise it changes a number of the whole step
            that the function is given.

    Example:
        >>> LABEL_SMOOTHING.check(0.1), LABEL_SMOOTHING.allowed
        (0.1, 'a number in [0, 0.5)')
    """

    name: str
    default: Any
    description: str
    kind: Literal["number", "flag", "choice"] = "number"
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    choices: tuple[str, ...] = ()
    remedy: str | None = None
    neutral: Any = None
    in_function: bool = True

    def __post_init__(self) -> None:
        if self.neutral is None:
            object.__setattr__(self, "neutral", self.default)

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        if self.kind == "flag":
            return "true or false"
        if self.kind == "choice":
            return ", ".join(self.choices)
        if self.low == -math.inf and self.high == math.inf:
            return "a finite number"
        if self.high == math.inf:
            return f"a number {'>' if self.low_open else '>='} {self.low:g}"
        return f"a number in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}{')' if self.high_open else ']'}"

    def check(self, value: Any) -> Any:
        """Return the value if it is allowed; numbers come back as ``float``.

        Args:
            value: What the user gave.

        Returns:
            The value, in the knob's own type.

        Raises:
            ConfigError: The value has the wrong type or is outside the range.
        """
        if self.kind == "flag":
            good = isinstance(value, bool)
        elif self.kind == "choice":
            good = isinstance(value, str) and value in self.choices
        else:
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and self._in_range(float(value))
        if not good:
            raise ConfigError(
                "the value is not allowed", where=self.name, value=value, allowed=self.allowed, remedy=self.remedy
            )
        return float(value) if self.kind == "number" else value

    def number(self, value: Any) -> float:
        """Check a number, see ``check``."""
        return float(self.check(value))

    def flag(self, value: Any) -> bool:
        """Check a flag, see ``check``."""
        return bool(self.check(value))

    def choice(self, value: Any) -> str:
        """Check a choice, see ``check``."""
        return str(self.check(value))

    def _in_range(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return math.isfinite(value) and above and below

    def with_default(self, default: Any) -> Knob:
        """Return the same knob with another default, for a method whose paper sets its own.

        Args:
            default: The new default.

        Returns:
            A copy.
        """
        return replace(self, default=default)


DIVERGENCE_NAMES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

BETA = Knob("beta", 0.1, "Strength of the pull towards the reference; larger stays closer.", low=0.0, low_open=True)

LABEL_SMOOTHING = Knob(
    "label_smoothing",
    0.0,
    "Assumed probability that a preference label is flipped.",
    low=0.0,
    high=0.5,
    high_open=True,
    remedy="at 0.5 the labels carry no information; 0.1 is the usual value",
)
EXO_LABEL_SMOOTHING = Knob(
    "label_smoothing",
    1e-3,
    "Probability that the target distribution gives the rejected completion.",
    low=0.0,
    high=0.5,
    low_open=True,
    high_open=True,
    remedy="at 0 the loss of exo_pair is infinite (it takes log 0); its paper uses 0.001",
    neutral=0.0,
)
F_DIVERGENCE_TYPE = Knob(
    "f_divergence_type",
    "reverse_kl",
    "Divergence that holds the policy near the reference.",
    kind="choice",
    choices=DIVERGENCE_NAMES,
)
F_ALPHA_DIVERGENCE_COEF = Knob(
    "f_alpha_divergence_coef",
    0.5,
    "Order of the alpha-divergence: 1 is reverse KL, 0 is forward KL.",
)
DISCOPOP_TAU = Knob(
    "discopop_tau",
    0.05,
    "Temperature of the mixture of logistic and exponential loss.",
    low=0.0,
    low_open=True,
)
DPOP_LAMBDA = Knob(
    "dpop_lambda",
    50.0,
    "Penalty on chosen completions that fall below the reference; 0 gives DPO.",
    low=0.0,
)
ODPO_ALPHA = Knob("odpo_alpha", 1.0, "Scale of the offset made of the score gap; 0 gives DPO.", low=0.0)
ODPO_TRANSFORM = Knob(
    "odpo_transform",
    "log",
    "Offset as a function of the score gap: its logarithm, or the gap itself.",
    kind="choice",
    choices=("log", "identity"),
)
IPO_NORMALIZE = Knob(
    "ipo_normalize",
    True,
    "Average log-ratios over completion tokens; false takes the plain sums of the paper's text.",
    kind="flag",
)
BCO_RUNNING_DELTA = Knob(
    "bco_running_delta",
    False,
    "Shift rewards by their running mean, as in the paper; TRL's bco_pair does not.",
    kind="flag",
    in_function=False,
)
SFT_AVERAGE = Knob(
    "sft_average",
    "batch_tokens",
    "Normalisation of the SFT term: mean over all chosen tokens of the step, or per pair over its own tokens.",
    kind="choice",
    choices=("batch_tokens", "pair_tokens"),
)
SIMPO_GAMMA = Knob("simpo_gamma", 0.5, "Target reward margin.", low=0.0)
CPO_ALPHA = Knob("cpo_alpha", 1.0, "Weight of the SFT term on the chosen completion.", low=0.0)
ALPHA = Knob("alpha", 0.0, "Shape of the AlphaPO reward (1 - p^-alpha) / alpha; 0 is log p.")
DESIRABLE_WEIGHT = Knob("desirable_weight", 1.0, "Weight of desirable completions.", low=0.0)
UNDESIRABLE_WEIGHT = Knob("undesirable_weight", 1.0, "Weight of undesirable completions.", low=0.0)

# Modifiers: they act on the log-probs or the pairs, whatever the loss.
LD_ALPHA = Knob(
    "ld_alpha",
    None,
    "LD-DPO: weight of tokens behind the shorter completion's length; unset or 1 keeps them whole.",
    low=0.0,
    high=1.0,
)
USE_WEIGHTING = Knob(
    "use_weighting",
    False,
    "WPO: weigh each pair by how probable its completions are under the policy.",
    kind="flag",
)
