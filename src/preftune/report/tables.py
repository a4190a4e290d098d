"""Numbers and nested results as tables of text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preftune.report.files import number, objects

#: Deeper levels of a result are shown as one line of text.
_MAX_COLUMNS = 10


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        columns: Headings.
        rows: Cells, as many in each row as there are headings.
        numeric: Columns that hold numbers, for their alignment.
        left_out: Rows that were too many.
    """

    columns: list[str]
    rows: list[list[str]]
    numeric: list[bool]
    left_out: int = 0


def figure(value: Any) -> str:
    """A number in four significant digits, anything else as text; a dash where there is nothing."""
    as_number = number(value)
    if as_number is None:
        return "-" if value is None else str(value)
    if isinstance(value, int) or (as_number.is_integer() and abs(as_number) < 1e15):
        return f"{int(as_number):,}"
    return f"{as_number:.4g}"


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.1f} %"


def level_of(evaluation: Mapping[str, Any]) -> str:
    """Nominal coverage of the intervals of an ``eval.json``: ``95 %``, also where the file does not tell."""
    level = number(evaluation.get("level"))
    return f"{100 * (level if level is not None and 0 < level < 1 else 0.95):.4g} %"


def is_interval(value: Any) -> bool:
    """Whether a value is an estimate with an interval."""
    return isinstance(value, Mapping) and number(value.get("mean", value.get("estimate"))) is not None


def interval(value: Any, *, as_share: bool = False) -> str:
    """An estimate with its interval: ``0.712 (0.680 to 0.741)``.

    Args:
        value: A mapping with ``mean`` (or ``estimate``), ``low``, ``high``; or a plain number.
        as_share: In per cent.

    Returns:
        The text.
    """
    if not is_interval(value):
        plain = number(value)
        return percent(plain) if as_share and plain is not None else figure(value)
    mean, low, high = (number(value.get(key)) for key in ("mean", "low", "high"))
    mean = number(value.get("estimate")) if mean is None else mean
    if mean is None:
        return "-"
    if as_share:
        text = percent(mean)
        return text if low is None or high is None else f"{text} ({100 * low:.1f} to {100 * high:.1f})"
    if low is None or high is None:
        return figure(mean)
    text, least, most = rounded(mean, low, high)
    return f"{text} ({least} to {most})"


def rounded(mean: float, low: float, high: float) -> tuple[str, str, str]:
    """An estimate and the ends of its interval, to the two digits of the interval's width that mean something."""
    width = high - low
    if not width > 0 or not math.isfinite(width):
        return figure(mean), figure(low), figure(high)
    # A width of 0.0999... is one of 0.1.
    decimals = 1 - math.floor(math.log10(width * 1.0001))
    if decimals > 6:
        return tuple(f"{value:.2g}" for value in (mean, low, high))  # type: ignore[return-value]
    # What a width of thousands leaves uncertain is not worth a zero in place of a digit.
    shown = (f"{round(value, max(decimals, 0)) + 0.0:,.{max(decimals, 0)}f}" for value in (mean, low, high))
    return tuple(shown)  # type: ignore[return-value]


def size(num_bytes: Any) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    left = number(num_bytes)
    if left is None:
        return "-"
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(left) < 1000:
            return f"{left:.3g} {unit}"
        left /= 1024
    return f"{left:,.3g} TiB"


def duration(seconds: float) -> str:
    """Seconds in the unit that people use."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.3g} h"


def is_share(name: str) -> bool:
    """Whether a metric of this name is a share of something."""
    return any(part in name for part in ("accurac", "share", "win_rate", "winrate"))


#: Names of common metrics as people say them.
_TITLES = {
    "loss": "loss",
    "rewards/accuracies": "preference accuracy",
    "rewards/margins": "reward margin",
    "rewards/chosen": "reward of the chosen answer",
    "rewards/rejected": "reward of the rejected answer",
    "logps/chosen": "log-prob of the chosen answer",
    "logps/rejected": "log-prob of the rejected answer",
    "kl": "KL to the reference",
    "logits/chosen": "mean logit of the chosen answer",
    "logits/rejected": "mean logit of the rejected answer",
    "grad_norm": "gradient norm",
    "mean_token_accuracy": "token accuracy",
    "preference_gain": "preference gain",
    "rewards/margins_over_beta": "reward margin over beta",
    "rewards/margins_per_token": "reward margin over beta, per token",
    "tail_share": "tokens from the reference's far tail",
    "rewards/ties": "ties",
    "logps/accuracies": "accuracy by log-probs",
    "logps/mean_accuracies": "accuracy by mean log-probs",
    "train_loss": "training loss, mean over the run",
}


def title_of(name: str) -> str:
    """A metric's name as people say it: ``eval_rewards/accuracies`` is ``Held-out preference accuracy``."""
    plain = name.removeprefix("eval_")
    words = _TITLES.get(plain, plain.replace("_", " "))
    said = words if plain == name else f"held-out {words}"
    return said[:1].upper() + said[1:]


def rows_of(entries: Any, *, limit: int = 200) -> Table | None:
    """A list of mappings as a table, one column for each key.

    Args:
        entries: The list; anything else gives no table.
        limit: Rows that are kept.

    Returns:
        The table, or ``None`` where there is nothing to put into one.
    """
    found = objects(entries)
    if not found:
        return None
    keys = list(dict.fromkeys(key for entry in found for key in entry))[:_MAX_COLUMNS]
    rows = [[_cell(key, entry.get(key)) for key in keys] for entry in found[:limit]]
    numeric = [all(_is_figure(entry.get(key)) for entry in found[:limit]) for key in keys]
    return Table([_words(key) for key in keys], rows, numeric, max(0, len(found) - limit))


def facts(values: Any, *, leave_out: Sequence[str] = ()) -> list[tuple[str, str]]:
    """A mapping as pairs of name and text; the entries of nested mappings carry their name.

    Args:
        values: The mapping; anything else gives no pairs.
        leave_out: Keys that are shown elsewhere.

    Returns:
        Name and text.
    """
    if not isinstance(values, Mapping):
        return []
    shown = []
    for key, value in values.items():
        if key in leave_out or value in (None, [], {}) or objects(value):
            continue
        if isinstance(value, Mapping) and not _is_estimate(value):
            shown += [
                (f"{_words(key)}: {_words(name)}", _cell(name, entry))
                for name, entry in value.items()
                if entry not in (None, [], {})
            ]
        else:
            shown.append((_words(key), _cell(key, value)))
    return shown


def _is_estimate(value: Any) -> bool:
    """Whether a value has the form of an estimate, also where there was nothing to estimate it from."""
    return isinstance(value, Mapping) and ("mean" in value or "estimate" in value)


def _cell(key: str, value: Any) -> str:
    if _is_estimate(value):
        return interval(value, as_share=is_share(key)) if is_interval(value) else "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(name)} {_cell(name, entry)}" for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(key, entry) for entry in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if number(value) is not None and is_share(key):
        return percent(float(value))
    return figure(value)


def _is_figure(value: Any) -> bool:
    return value is None or _is_estimate(value) or number(value) is not None


def _words(key: Any) -> str:
    return str(key).replace("_", " ")
