"""A sweep as its plots need it: fields with their scales, trials with intervals, the best and its equals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from preftune.report.files import mapping, number, objects
from preftune.report.read import Sweep
from preftune.report.settings import text_of
from preftune.report.tables import Table, interval, is_share, title_of
from preftune.stats.significance import holm

MAXIMIZE, MINIMIZE = "maximize", "minimize"
_LEVEL = 0.05
#: Half the width of a normal 95 % interval, in standard errors.
_HALF_WIDTH = 1.959963984540054


@dataclass(frozen=True)
class Field:
    """A setting that the sweep varied.

    Attributes:
        name: Its name.
        values: Its values, in order.
        numeric: Whether all are numbers.
        log: Whether a logarithmic scale suits them.
    """

    name: str
    values: list[Any]
    numeric: bool
    log: bool


@dataclass(frozen=True)
class Metric:
    """A result of every trial.

    Attributes:
        name: Its name.
        direction: ``maximize``, ``minimize``, or ``None`` where neither is better.
        best: Number of the best trial.
        tied: Numbers of the trials that cannot be told from it.
        tested: How that was found out.
    """

    name: str
    direction: str | None
    best: Any
    tied: list[Any]
    tested: str


def fields_of(sweep: Sweep) -> list[Field]:
    """The settings that vary over the trials, beta and the learning rate first.

    Args:
        sweep: The sweep.

    Returns:
        Fields with two values or more.
    """
    seen: dict[str, dict[str, Any]] = {}
    for trial in sweep.trials:
        for name, value in mapping(trial.get("params")).items():
            seen.setdefault(name, {})[text_of(value)] = value
    found = []
    for name, by_text in seen.items():
        values = list(by_text.values())
        numbers = [as_number for value in values if (as_number := number(value)) is not None]
        numeric = len(numbers) == len(values)
        if len(values) > 1:
            ordered = sorted(values) if numeric else values
            log = numeric and min(numbers) > 0 and max(numbers) / min(numbers) >= 4
            found.append(Field(name, ordered, numeric, log))
    rank = {"learning_rate": 0, "beta": 1}
    return sorted(found, key=lambda item: rank.get(item.name, 2))


def metrics_of(sweep: Sweep) -> list[Metric]:
    """Every metric with its best trial and those that cannot be told from it.

    Args:
        sweep: The sweep.

    Returns:
        The sweep's own metric first.
    """
    names = list(dict.fromkeys(name for trial in sweep.trials for name in mapping(trial.get("metrics"))))
    own = sweep.content.get("metric")
    names.sort(key=lambda name: name != own)
    return [_metric(sweep, name) for name in names if any(_estimate(trial, name) for trial in sweep.trials)]


def sweep_payload(sweep: Sweep) -> dict[str, Any]:
    """The sweep as the page's plots take it.

    Args:
        sweep: The sweep.

    Returns:
        A mapping that ``json.dumps`` takes.
    """
    metrics = metrics_of(sweep)
    return {
        "name": sweep.name,
        "fields": [vars(item) for item in fields_of(sweep)],
        "metrics": [
            vars(metric) | {"share": is_share(metric.name), "title": title_of(metric.name)} for metric in metrics
        ],
        "kl": next((metric.name for metric in metrics if is_kl(metric.name)), None),
        "trials": [
            {
                "number": trial.get("number"),
                "params": mapping(trial.get("params")),
                "state": str(trial.get("state", "")),
                "left": trial.get("left_reference") is True,
                "seconds": number(trial.get("seconds")),
                "metrics": {name: found for metric in metrics if (found := _estimate(trial, name := metric.name))},
            }
            for trial in sweep.trials
        ],
    }


def trials_table(sweep: Sweep, metrics: Sequence[Metric]) -> Table:
    """All trials, the best first, as a table: what the maps show, in words and numbers."""
    fields = list(dict.fromkeys(name for trial in sweep.trials for name in mapping(trial.get("params"))))
    columns = [
        "trial",
        *(name.replace("_", " ") for name in fields),
        *(title_of(metric.name) for metric in metrics),
        "state",
        "seconds",
    ]
    rows = []
    for trial in sorted(sweep.trials, key=lambda trial: _order(trial, metrics)):
        row = [text_of(trial.get("number"))]
        row += [text_of(mapping(trial.get("params")).get(name)) for name in fields]
        for metric in metrics:
            text = interval(mapping(trial.get("metrics")).get(metric.name), as_share=is_share(metric.name))
            mark = _mark(trial.get("number"), metric)
            row.append(f"{text} · {mark}" if mark else text)
        state = str(trial.get("state", "")).lower()
        state += " · left the reference" if trial.get("left_reference") is True else ""
        rows.append([*row, state, _seconds(trial)])
    numeric = [True, *(True for _ in fields), *(True for _ in metrics), False, True]
    return Table(columns, rows, numeric)


def is_kl(name: str) -> bool:
    """Whether a metric is a divergence from the reference."""
    return "kl" in name.lower().replace("/", "_").replace("-", "_").split("_")


def direction_of(name: str) -> str | None:
    """Which way a metric is better, as far as its name tells."""
    lower = name.lower()
    if lower.endswith(("/chosen", "/rejected")):
        return None
    if any(word in lower for word in ("loss", "perplexity", "brier", "ece")):
        return MINIMIZE
    if any(word in lower for word in ("accurac", "margin", "reward", "win_rate", "winrate", "length_controlled")):
        return MAXIMIZE
    return None


def _metric(sweep: Sweep, name: str) -> Metric:
    is_own = name == sweep.content.get("metric")
    direction = sweep.content.get("direction") if is_own else direction_of(name)
    scored = [(trial, found) for trial in sweep.trials if (found := _estimate(trial, name))]
    if direction not in (MAXIMIZE, MINIMIZE) or not scored:
        return Metric(name, None, None, [], "")
    sign = 1 if direction == MAXIMIZE else -1
    best = max(scored, key=lambda item: sign * item[1]["mean"])[0]
    if is_own:
        # Among equals the sweep has its reasons; the page frames the trial that it names.
        named = mapping(sweep.content.get("best")).get("number")
        best = next((trial for trial, _ in scored if trial.get("number") == named), best)
    drawn = mapping(mapping(sweep.content.get("maps")).get(name))
    if not is_own and drawn.get("best") is not None:
        best = next((trial for trial, _ in scored if trial.get("number") == drawn["best"]), best)
    # As of trials, only a number or a name says which one is meant.
    told = {
        cell["number"]: cell.get("tied_with_best")
        for cell in objects(drawn.get("cells"))
        if isinstance(cell.get("number"), (int, str))
    }
    flags = {trial.get("number"): _flag(trial, name, is_own, told.get(trial.get("number"))) for trial, _ in scored}
    if any(flag is not None for flag in flags.values()):
        tied = [key for key, flag in flags.items() if flag and key != best.get("number")]
        return Metric(
            name, direction, best.get("number"), tied, "paired tests over the shared held-out pairs, Holm-corrected"
        )
    return Metric(name, direction, best.get("number"), *_unpaired_ties(scored, best, name))


def _unpaired_ties(
    scored: Sequence[tuple[dict[str, Any], dict[str, float]]], best: dict[str, Any], name: str
) -> tuple[list[Any], str]:
    """Normal tests of differences from the best, errors taken from the intervals.

    Trials are scored on the same pairs, which makes their difference more certain than this knows: it calls more trials
    equal than a paired test would, never fewer in the long run.
    """
    top = _estimate(best, name) or {}
    others = [(trial, found) for trial, found in scored if trial is not best and "low" in found and "high" in found]
    if "low" not in top or "high" not in top or not others:
        return [], ""
    p_values = []
    for _, found in others:
        error = math.hypot(*((each["high"] - each["low"]) / 2 / _HALF_WIDTH for each in (found, top)))
        gap = abs(found["mean"] - top["mean"])
        p_values.append(1.0 if gap == 0 else 0.0 if error == 0 else float(2 * stats.norm.sf(gap / error)))
    adjusted = holm(p_values)
    tied = [trial.get("number") for (trial, _), p in zip(others, adjusted, strict=True) if p > _LEVEL]
    return tied, "normal tests from the intervals, as if trials shared no pairs, Holm-corrected"


def _flag(trial: dict[str, Any], name: str, is_own: bool, drawn: Any) -> bool | None:
    entry = mapping(mapping(trial.get("metrics")).get(name))
    flag = entry.get("tied_with_best", trial.get("tied_with_best") if is_own else drawn)
    return flag if isinstance(flag, bool) else None


def _estimate(trial: dict[str, Any], name: str) -> dict[str, float] | None:
    value = mapping(trial.get("metrics")).get(name)
    entry = value if isinstance(value, dict) else {"mean": value}
    found = {
        key: as_number for key in ("mean", "low", "high", "n") if (as_number := number(entry.get(key))) is not None
    }
    return found if "mean" in found else None


def _seconds(trial: dict[str, Any]) -> str:
    seconds = number(trial.get("seconds"))
    return "-" if seconds is None else f"{seconds:.3g}"


def _mark(trial: Any, metric: Metric) -> str:
    return "best" if trial == metric.best else "tied" if trial in metric.tied else ""


def _order(trial: dict[str, Any], metrics: Sequence[Metric]) -> tuple[bool, bool, float]:
    first = metrics[0] if metrics else None
    found = _estimate(trial, first.name) if first else None
    left = trial.get("left_reference") is True
    if found is None or first is None:
        return True, left, 0.0
    return False, left, found["mean"] if first.direction == MINIMIZE else -found["mean"]
