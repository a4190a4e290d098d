"""From log lines to the curves of a page: which metrics share a plot, against what, and in how few bytes.

Every logged value travels to the page: 4 bytes each, as base64. The page itself draws as many points as the screen can
show, the extremes of every interval among them, and goes back to all of them when a reader zooms in.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from preftune.report.files import number
from preftune.report.read import Run

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class PlotSpec:
    """One plot: metrics that are read together.

    Attributes:
        key: Identifier within the page.
        title: Heading.
        metrics: Names in the log (without ``eval_``) and what a legend calls them.
        help: One sentence on how to read it.
        level: Horizontal line worth comparing with.
        level_label: What that line means.
        unit: What the upright axis counts.
    """

    key: str
    title: str
    metrics: tuple[tuple[str, str], ...]
    help: str
    level: float | None = None
    level_label: str = ""
    unit: str = ""


PLOTS = (
    PlotSpec(
        "loss",
        "Loss",
        (("loss", "loss"),),
        "Falls while the model learns; held-out loss that turns up again means overfitting.",
        unit="loss",
    ),
    PlotSpec(
        "accuracies",
        "Preference accuracy",
        (("rewards/accuracies", "accuracy"),),
        "Share of pairs whose chosen answer has the higher implicit reward. A weak proxy for quality.",
        0.5,
        "chance",
        "share of pairs",
    ),
    PlotSpec(
        "margins",
        "Reward margin",
        (("rewards/margins", "margin"),),
        "Implicit reward of the chosen minus that of the rejected answer, in units of beta times nats.",
        0.0,
        "the reference",
        "beta times nats",
    ),
    PlotSpec(
        "rewards",
        "Rewards",
        (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")),
        "Below zero means less likely than under the reference; chosen rewards that fall too deserve a look.",
        0.0,
        "the reference",
        "beta times nats",
    ),
    PlotSpec(
        "logps",
        "Log-probabilities",
        (("logps/chosen", "chosen"), ("logps/rejected", "rejected")),
        "Summed over the tokens of a completion, in nats.",
        unit="nats",
    ),
    PlotSpec(
        "entropy",
        "Entropy",
        (("entropy", "entropy"), ("generation/entropy", "of its own answers")),
        "Mean over completion tokens, in nats; a collapse means less varied text.",
        unit="nats a token",
    ),
    PlotSpec(
        "token_accuracy",
        "Token accuracy",
        (("mean_token_accuracy", "token accuracy"),),
        "Share of completion tokens that are the model's first choice.",
        unit="share of tokens",
    ),
    PlotSpec(
        "finished",
        "Answers that end",
        (("generation/finished", "finished"),),
        "Share of sampled answers that the model ended itself, before the limit of tokens.",
        unit="share of answers",
    ),
    PlotSpec(
        "tail_share",
        "Tokens from the reference's far tail",
        (("generation/tail_share", "share"),),
        "Share of sampled tokens that are among the 1 % least likely under the reference.",
        0.01,
        "at most, of the reference itself",
        "share of tokens",
    ),
    PlotSpec("learning_rate", "Learning rate", (("learning_rate", "learning rate"),), "As scheduled.", unit="rate"),
    PlotSpec(
        "grad_norm",
        "Gradient norm",
        (("grad_norm", "gradient norm"),),
        "Before clipping; spikes come before instabilities.",
        unit="norm",
    ),
    PlotSpec(
        "logits",
        "Mean logits",
        (("logits/chosen", "chosen"), ("logits/rejected", "rejected")),
        "Mean over completion tokens and vocabulary.",
        unit="logit",
    ),
)
_KL = PlotSpec("kl", "KL to the reference", (), "How far the policy has moved, in nats.", 0.0, "the reference", "nats")
_LENGTHS = PlotSpec(
    "lengths", "Lengths", (), "In tokens; lengths that only grow point to length exploitation.", unit="tokens"
)
_GUARDS = PlotSpec("guards", "Guard signals", (), "What the guards look at.")
_OTHER = PlotSpec("other", "", (), "As logged.")

_LARGEST = float(np.finfo(np.float32).max)

# Bookkeeping, not metrics.
_IGNORED = frozenset(
    {
        "step",
        "epoch",
        "num_tokens",
        "num_input_tokens_seen",
        "total_flos",
        "time",
        "train_loss",
        "train_runtime",
        "runtime",
        "model_preparation_time",
    }
)
_BOUND = re.compile(r"_(low|high)\Z")
_SPEED = re.compile(r"(_per_second|_runtime|_preparation_time)\Z")


@dataclass(frozen=True)
class Curve:
    """Values of one metric.

    Attributes:
        rows: Log lines they stand in, as indices into the axes.
        values: The values.
    """

    rows: Array
    values: Array


@dataclass(frozen=True)
class Curves:
    """All curves of a run.

    Attributes:
        axes: ``step``, and ``tokens``, ``time`` and ``epoch`` where the log has them; one number for every log line.
        estimated_time: Whether the time was spread evenly over the steps, because only its sum is known.
        train: Curves of training lines by metric.
        evaluation: Curves of evaluation lines by metric, without ``eval_``.
    """

    axes: dict[str, Array]
    estimated_time: bool
    train: dict[str, Curve]
    evaluation: dict[str, Curve]

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics."""
        return list(dict.fromkeys([*self.train, *self.evaluation]))


def curves_of(run: Run) -> Curves:
    """Order the log lines of a run by metric.

    Args:
        run: The run.

    Returns:
        Its curves; empty where it logged nothing.
    """
    lines = sorted(
        (line for line in run.history if number(line.get("step")) is not None), key=lambda line: line["step"]
    )
    axes = {"step": np.array([float(line["step"]) for line in lines])}
    epochs = [number(line.get("epoch")) for line in lines]
    if lines and all(value is not None for value in epochs):
        axes["epoch"] = np.array(epochs, dtype=float)
    tokens = [number(line.get("num_tokens", line.get("num_input_tokens_seen"))) for line in lines]
    if sum(value is not None for value in tokens) > 1:
        axes["tokens"] = _filled(axes["step"], tokens)
    seconds, estimated = _seconds(run, lines, axes["step"])
    if seconds is not None:
        axes["time"] = seconds
    train: dict[str, tuple[list[int], list[float]]] = {}
    evaluation: dict[str, tuple[list[int], list[float]]] = {}
    for row, line in enumerate(lines):
        for key, entry in line.items():
            value = number(entry)
            name = key.removeprefix("eval_")
            if value is None or name in _IGNORED or _SPEED.search(name) or _all_ties(line, key, value):
                continue
            rows, values = (train if name == key else evaluation).setdefault(name, ([], []))
            rows.append(row)
            values.append(value)
    return Curves(axes, estimated, _arrays(train), _arrays(evaluation))


def _all_ties(line: dict[str, Any], key: str, value: float) -> bool:
    """An accuracy of 0 at a margin of 0 to the bit: every pair is a tie, which counts as wrong and says nothing."""
    return key.endswith("rewards/accuracies") and value == 0 and line.get(key.replace("accuracies", "margins")) == 0


def plots_for(metrics: Sequence[str]) -> list[PlotSpec]:
    """The plots that a set of metrics fills; metrics that nobody foresaw get one of their own.

    Args:
        metrics: Names in the log, without ``eval_``.

    Returns:
        Plots in reading order, each with the metrics that exist.
    """
    # The ends of an interval are drawn with the metric they belong to.
    left = {name: None for name in metrics if not (_BOUND.search(name) and _BOUND.sub("", name) in metrics)}
    known: dict[str, PlotSpec] = {}
    for spec in PLOTS:
        found = tuple((name, label) for name, label in spec.metrics if name in left)
        if found:
            known[spec.key] = replace(spec, metrics=found)
            for name, _ in found:
                del left[name]
    for spec, pattern in ((_GUARDS, r"\Aguards?/"), (_KL, r"(\A|[/_ ])kl(\Z|[/_ ])"), (_LENGTHS, r"length")):
        found = tuple((name, _label(name)) for name in left if re.search(pattern, name, re.IGNORECASE))
        if found:
            known[spec.key] = replace(spec, metrics=found)
            for name, _ in found:
                del left[name]
    order = ["loss", "accuracies", "margins", "rewards", "logps", "kl", "entropy", "lengths"]
    plots = [known.pop(key) for key in order if key in known] + list(known.values())
    for position, name in enumerate(left):
        plots.append(PlotSpec(f"other-{position}", _title(name), ((name, _label(name)),), _OTHER.help))
    return plots


def encode(values: Array, *, exact: bool = False) -> dict[str, str]:
    """Numbers as base64, four bytes each, eight where `exact`; little-endian, as every browser has them."""
    # Values that have run away do not fit into four bytes, and are what somebody looks for.
    too_large = bool(len(values)) and float(np.abs(values).max()) > _LARGEST
    kind = "<f8" if exact or too_large else "<f4"
    return {"type": kind[1:], "data": base64.b64encode(values.astype(kind).tobytes()).decode("ascii")}


def payload(curves: Curves) -> dict[str, Any]:
    """The curves as the page takes them.

    Args:
        curves: Of one run.

    Returns:
        A mapping that ``json.dumps`` takes.
    """
    num_rows = len(curves.axes["step"])

    def one(curve: Curve) -> dict[str, Any]:
        whole = len(curve.rows) == num_rows
        return {"rows": None if whole else encode(curve.rows), "values": encode(curve.values)}

    return {
        # Steps and tokens beyond 2^24 would lose their last digit in four bytes.
        "axes": {
            name: encode(axis, exact=bool(len(axis)) and float(axis.max()) >= 2**24)
            for name, axis in curves.axes.items()
        },
        "estimatedTime": curves.estimated_time,
        "train": {name: one(curve) for name, curve in curves.train.items()},
        "eval": {name: one(curve) for name, curve in curves.evaluation.items()},
    }


def _title(name: str) -> str:
    words = name.replace("_", " ").replace("/", ": ")
    return words[:1].upper() + words[1:]


def _label(name: str) -> str:
    return name.rpartition("/")[2].replace("_", " ")


def _arrays(found: dict[str, tuple[list[int], list[float]]]) -> dict[str, Curve]:
    return {name: Curve(np.array(rows, float), np.array(values, float)) for name, (rows, values) in found.items()}


def _filled(steps: Array, values: Sequence[float | None]) -> Array:
    """Evaluation lines do not count tokens: theirs follow from the lines around them."""
    known = [index for index, value in enumerate(values) if value is not None]
    filled: Array = np.interp(steps, steps[known], np.array([values[index] for index in known], dtype=float))
    return filled


def _seconds(run: Run, lines: Sequence[dict[str, Any]], steps: Array) -> tuple[Array | None, bool]:
    """Time of every log line since the start, without the breaks before a resume."""
    clock = _clock(run.events)
    if len(clock) > 1 and len(lines):
        known = sorted(clock)
        return np.interp(steps, known, [clock[step] for step in known]), False
    runtime = next((number(line["train_runtime"]) for line in reversed(run.history) if "train_runtime" in line), None)
    # A resumed run's train_runtime is that of its last part alone; there is no telling, so the sum is what is shown.
    if runtime is None or not len(steps) or steps[-1] <= 0:
        return None, False
    return steps / steps[-1] * runtime, True


def _clock(events: Sequence[dict[str, Any]]) -> dict[float, float]:
    """Seconds of training up to each logged step."""
    clock: dict[float, float] = {}
    spent, last = 0.0, None
    for event in events:
        now, step = number(event.get("time")), number(event.get("step"))
        if now is None or step is None:
            continue
        if event.get("event") == "begin":
            clock = {at: seconds for at, seconds in clock.items() if at <= step}
            spent = max(clock.values(), default=0.0)
        elif last is not None:
            # A clock that was set back must not make time run backwards.
            spent += max(0.0, now - last)
        last = now
        clock[step] = spent
    return clock
