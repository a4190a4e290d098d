"""Lengths: does the longer answer win, how long are sequences, and what do the chosen limits cut off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from preftune.data.audit.proportions import share_of
from preftune.data.audit.report import Finding, Severity
from preftune.data.audit.rows import Rows
from preftune.data.audit.text import words
from preftune.data.options import DataOptions
from preftune.data.truncation import TokenPair, truncate

Array = np.ndarray[Any, np.dtype[np.float64]]

_QUANTILES = {"p50": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99}
_NUM_BUCKETS = 24
# No paper names a limit; these are the project's own.
_NOTABLE, _STRONG = 0.55, 0.65


def word_lengths(texts: Sequence[str]) -> Array:
    """Words of each text."""
    return np.array([len(words(text)) for text in texts], dtype=np.float64)


def check_length_bias(rows: Rows, chosen: Array, rejected: Array, unit: str) -> Finding:
    """How often the longer answer is the chosen one, among pairs of different lengths.

    The correlation is that of the label with the difference in length, every pair read from both sides:
    ``mean(d) / sqrt(mean(d^2))`` with ``d`` the chosen less the rejected length.
    """
    gaps = chosen - rejected
    different = np.flatnonzero(gaps != 0)
    found = share_of([bool(gaps[i] > 0) for i in different], [rows.prompts[i] for i in different])
    size = float(np.sqrt(np.mean(gaps**2))) if len(gaps) else 0.0
    correlation = float(np.mean(gaps)) / size if size else 0.0
    away = max(found.low, 1 - found.high) if found.total else 0.0
    severity: Severity = "warn" if away > _STRONG else "note" if away > _NOTABLE else "ok"
    longer = found.share >= 0.5
    detail = {
        "ok": f"Length says little or nothing about the label (correlation {correlation:+.2f}).",
        "note": f"{'Longer' if longer else 'Shorter'} answers tend to win (correlation {correlation:+.2f}): watch the"
        " length of generations during training.",
        "warn": f"{'Longer' if longer else 'Shorter'} answers mostly win (correlation {correlation:+.2f}), so that a"
        " model can do well by length alone: consider a length-controlled method (LD-DPO, SimPO, sigmoid_norm), and"
        " compare results at equal length.",
    }[severity]
    return Finding(
        "length_bias",
        severity,
        f"the longer answer wins in {found} of {found.total:,} pairs of different length ({unit})",
        detail,
        **found.fields(),
        source=(
            f"heuristic: 'note' where the interval lies beyond {_NOTABLE:.0%}, 'warn' beyond {_STRONG:.0%}; that models"
            " learn length from it: Park et al. 2024 (arXiv:2403.19159)"
        ),
        threshold_kind="heuristic",
    )


def describe(columns: Mapping[str, Array], unit: str) -> dict[str, Any]:
    """Statistics and histogram of each column of lengths.

    Args:
        columns: Part -> lengths.
        unit: What is counted.

    Returns:
        ``unit``; per part mean, quantiles and maximum; and ``histogram`` with common edges.
    """
    out: dict[str, Any] = {"unit": unit}
    full = {name: values for name, values in columns.items() if len(values)}
    for name, values in full.items():
        stats = {"mean": float(np.mean(values)), "min": float(np.min(values)), "max": float(np.max(values))}
        out[name] = stats | {key: float(np.quantile(values, q)) for key, q in _QUANTILES.items()}
    top = max((float(np.max(values)) for values in full.values()), default=0.0)
    if top > 0:
        edges = np.unique(np.round(np.geomspace(1, top + 1, _NUM_BUCKETS + 1))) if top > 1 else np.array([1.0, 2.0])
        edges = np.concatenate([[0.0], edges])
        counts = {name: np.histogram(values, edges)[0].tolist() for name, values in full.items()}
        out["histogram"] = {"edges": edges.tolist(), **counts}
    return out


def needed(sequences: Array) -> dict[str, int]:
    """``max_length`` that keeps a share of the rows whole."""
    shares = {"half": 0.5, "90%": 0.9, "95%": 0.95, "99%": 0.99, "all": 1.0}
    return {name: math.ceil(np.quantile(sequences, q, method="higher")) for name, q in shares.items()}


def check_truncation(
    rows: Rows, pairs: Sequence[TokenPair], numbers: Sequence[int], options: DataOptions
) -> tuple[Finding, dict[str, Any]]:
    """What ``max_length``, ``max_prompt_length`` and ``truncation_mode`` leave of each row.

    Args:
        rows: The rows.
        pairs: Their token ids before truncation; a single answer stands on both sides.
        numbers: Position in ``rows`` of each.
        options: The limits.

    Returns:
        The finding, and figures for the report.
    """
    tally = _Cuts()
    whole = np.array([longest(pair) for pair in pairs])
    for pair, i in zip(pairs, numbers, strict=True):
        tally.enter(pair, rows.numbers[i], rows.paired, options)
    size = needed(whole) if len(whole) else {}
    lost, cut, total = sum(tally.dropped.values()), tally.num_cut, max(1, len(pairs))
    found = share_of(tally.flags, [rows.prompts[i] for i in numbers])
    severity: Severity = "ok"
    if found.count:
        severity = "problem" if lost > 0.1 * total or tally.num_same else "warn" if found.share > 0.05 else "note"
    limit = f"max_length {options.max_length}, {options.truncation_mode}"
    if options.max_prompt_length is not None:
        limit += f", max_prompt_length {options.max_prompt_length}"
    detail = "Nothing is cut."
    if found.count:
        detail = (
            f"{cut:,} rows lose tokens, {tally.num_no_end:,} of them the end of an answer with its end-of-sequence"
            f" token, and {lost:,} are dropped with nothing left to learn from."
            + (f" {tally.num_same:,} pairs have the same answers after the cut." if tally.num_same else "")
            + f" max_length {size['95%']:,} keeps 95 % of the rows whole, {size['99%']:,} 99 %, {size['all']:,} all."
        )
    figures = {
        "max_length": options.max_length,
        "max_prompt_length": options.max_prompt_length,
        "truncation_mode": options.truncation_mode,
        "num_truncated": cut,
        "num_end_lost": tally.num_no_end,
        "num_same_after": tally.num_same,
        "dropped": tally.dropped,
        "tokens_lost_share": tally.lost_tokens / max(1, tally.all_tokens),
        "max_length_to_keep": size,
    }
    finding = Finding(
        "truncation",
        severity,
        f"{found.count:,} of {len(pairs):,} rows ({found}) are cut or dropped ({limit})",
        detail,
        **found.fields(),
        examples=tuple(tally.examples[:5]),
        source="heuristic: 'warn' from 5 % of the rows on; 'problem' where a tenth of the rows is dropped, or answers"
        " become equal",
        threshold_kind="heuristic",
    )
    return finding, figures


def longest(pair: TokenPair) -> int:
    """Tokens of the longer of the two sequences."""
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


class _Cuts:
    """Counts what truncation does."""

    def __init__(self) -> None:
        self.flags: list[bool] = []
        self.dropped: dict[str, int] = {}
        self.num_cut = self.num_no_end = self.num_same = 0
        self.all_tokens = self.lost_tokens = 0
        self.examples: list[dict[str, Any]] = []

    def enter(self, pair: TokenPair, number: int, paired: bool, options: DataOptions) -> None:
        kept, reason = truncate(pair, options.max_length, options.max_prompt_length, options.truncation_mode)
        left = kept.num_tokens if kept else 0
        self.all_tokens += pair.num_tokens
        self.lost_tokens += pair.num_tokens - left
        self.flags.append(left < pair.num_tokens)
        if kept is None:
            self.dropped[str(reason)] = self.dropped.get(str(reason), 0) + 1
        elif left < pair.num_tokens:
            self.num_cut += 1
            ends = ((pair.chosen, kept.chosen), (pair.rejected, kept.rejected))
            self.num_no_end += any(len(after) < len(before) and after[-1:] != before[-1:] for before, after in ends)
            self.num_same += paired and kept.chosen == kept.rejected
        if self.flags[-1]:
            self.examples.append({"row": number, "tokens": longest(pair), "becomes": reason or "cut"})
