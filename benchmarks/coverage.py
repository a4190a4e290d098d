"""How often 95 % intervals hold the truth, in simulation: ``python -m benchmarks.coverage``.

Every scenario draws data whose true mean is known, thousands of times, and asks the library's own functions for their
interval. The table says, for each kind of data and each number of independent groups, in how many per cent of the
draws the interval held the truth, and how wide it was. It goes to ``benchmarks/results/evaluation/coverage.json`` and
into ``docs/evaluation.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import seeded, stale
from preftune.stats.intervals import (
    Interval,
    bootstrap_mean,
    paired_proportion_interval,
    proportion_interval,
    wilson_interval,
)

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "evaluation" / "coverage.json"
DOCUMENT = HERE.parent / "docs" / "evaluation.md"
GROUPS = (10, 20, 30, 50, 100, 200)
PROMISE = (0.93, 0.97)

Array = np.ndarray[Any, np.dtype[np.float64]]
Rows = tuple[Array, Any]
Draw = Callable[[np.random.Generator, int], Rows]


def clusters(rng: np.random.Generator, num_groups: int) -> Any:
    """Group number of every row; groups have one to six rows."""
    return np.repeat(np.arange(num_groups), rng.integers(1, 7, size=num_groups))


def margins(rng: np.random.Generator, num_groups: int) -> Rows:
    """Margins that share four fifths of their variance within a prompt."""
    groups = clusters(rng, num_groups)
    return 0.5 + rng.normal(size=num_groups)[groups] + 0.5 * rng.normal(size=len(groups)), groups


def skewed(rng: np.random.Generator, num_groups: int) -> Rows:
    """Right-skewed values, such as log-ratios of samples."""
    groups = clusters(rng, num_groups)
    return rng.gamma(2.0, size=num_groups)[groups] + 0.5 * rng.normal(size=len(groups)), groups


def outcomes(share: float, correlation: float) -> Draw:
    """Right or wrong, with beta-distributed shares per prompt."""

    def draw(rng: np.random.Generator, num_groups: int) -> Rows:
        groups = clusters(rng, num_groups)
        weight = (1 - correlation) / correlation
        shares = rng.beta(share * weight, (1 - share) * weight, size=num_groups)
        return (rng.random(len(groups)) < shares[groups]).astype(float), groups

    return draw


def independent(share: float) -> Draw:
    """Right or wrong, one row per prompt."""
    return lambda rng, num_groups: ((rng.random(num_groups) < share).astype(float), np.arange(num_groups))


def differences(rng: np.random.Generator, num_groups: int) -> Rows:
    """Difference in margin of two checkpoints on the same clustered pairs."""
    groups = clusters(rng, num_groups)
    return 0.1 + 0.3 * rng.normal(size=num_groups)[groups] + 0.3 * rng.normal(size=len(groups)), groups


def changed(rng: np.random.Generator, num_groups: int) -> Rows:
    """Difference in right answers of two checkpoints, -1, 0 or 1: 20 % change for the better, 10 % for the worse."""
    groups = clusters(rng, num_groups)
    # Within a prompt, changes point the same way more often than not.
    lean = rng.beta(4.0, 2.0, size=num_groups)
    moved = rng.random(len(groups)) < 0.3
    better = rng.random(len(groups)) < lean[groups]
    return np.where(moved, np.where(better, 1.0, -1.0), 0.0), groups


_BOOTSTRAPS = ("percentile", "bca", "student")
SCENARIOS: dict[str, tuple[str, Draw, float, tuple[str, ...]]] = {
    "margins": ("margins, clustered", margins, 0.5, ("percentile", "bca", "student")),
    "skewed": ("log-ratios, skewed, clustered", skewed, 2.0, ("percentile", "bca", "student")),
    "outcomes 0.6": ("accuracy 0.6, clustered", outcomes(0.6, 0.3), 0.6, ("percentile", "bca", "wilson groups")),
    "outcomes 0.9": ("accuracy 0.9, clustered", outcomes(0.9, 0.3), 0.9, ("percentile", "bca", "wilson groups")),
    "independent 0.7": ("accuracy 0.7, independent", independent(0.7), 0.7, ("bca", "wilson groups", "wilson")),
    "differences": ("paired difference of margins, clustered", differences, 0.1, ("percentile", "bca", "student")),
    "changed": ("paired difference of accuracies, clustered", changed, 0.1, (*_BOOTSTRAPS, "tango groups")),
}


def interval(method: str, values: Array, groups: Any, seed: int, num_resamples: int) -> Interval:
    """The library's interval of a mean."""
    if method == "wilson":
        return wilson_interval(int(values.sum()), len(values))
    if method == "wilson groups":
        return proportion_interval(values, groups=groups.tolist())
    if method == "tango groups":
        return paired_proportion_interval(values, groups=groups.tolist())
    return bootstrap_mean(
        values,
        groups=groups.tolist(),
        method=method,  # type: ignore[arg-type]
        num_resamples=num_resamples,
        seed=seed,
    )


def measure(name: str, num_groups: int, num_simulations: int, num_resamples: int) -> list[dict[str, Any]]:
    """Coverage and mean width of every method on one kind of data; all methods see the same draws."""
    title, draw, truth, methods = SCENARIOS[name]
    hits = dict.fromkeys(methods, 0)
    widths = dict.fromkeys(methods, 0.0)
    for simulation in range(num_simulations):
        values, groups = draw(np.random.default_rng([20, num_groups, simulation]), num_groups)
        for method in methods:
            found = interval(method, values, groups, simulation, num_resamples)
            hits[method] += found.low <= truth <= found.high
            widths[method] += found.high - found.low
    return [
        {
            "scenario": name,
            "title": title,
            "groups": num_groups,
            "method": method,
            "coverage": hits[method] / num_simulations,
            "width": widths[method] / num_simulations,
            "simulations": num_simulations,
            "resamples": num_resamples,
        }
        for method in methods
    ]


def table(cells: list[dict[str, Any]]) -> str:
    """The cells as a Markdown table: per cent, bold where within the promise."""
    sizes = sorted({cell["groups"] for cell in cells})
    lines = [
        "| data | interval | " + " | ".join(f"{size} groups" for size in sizes) + " |",
        "|---|---|" + "---:|" * len(sizes),
    ]
    found = {(cell["scenario"], cell["method"], cell["groups"]): cell for cell in cells}
    for name, method in dict.fromkeys((cell["scenario"], cell["method"]) for cell in cells):
        shown = []
        for size in sizes:
            share = found[name, method, size]["coverage"]
            text = f"{100 * share:.1f}"
            shown.append(f"**{text}**" if PROMISE[0] <= share <= PROMISE[1] else text)
        lines.append(f"| {SCENARIOS[name][0]} | {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def render(result: dict[str, Any], document: Path) -> None:
    """Put the table between its marks in the document."""
    note = f"Per cent of {result['simulations']:,} simulations each (standard error {result['error']:.1f} points)."
    seeded.place(document, "coverage", f"{note}\n\n{table(result['cells'])}")


def main(argv: list[str] | None = None) -> int:
    """Simulate, write the JSON and the document.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--only", choices=SCENARIOS, nargs="*", default=list(SCENARIOS))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--render", action="store_true", help="only put the stored table into the document")
    args = parser.parse_args(argv)
    if args.render:
        render(json.loads(args.out.read_text(encoding="utf-8")), args.document)
        return 0
    started, cells = time.perf_counter(), []
    for name in args.only:
        for num_groups in GROUPS:
            cells += measure(name, num_groups, args.simulations, args.resamples)
            last = [cell for cell in cells if cell["scenario"] == name and cell["groups"] == num_groups]
            print(name, num_groups, {cell["method"]: round(100 * cell["coverage"], 1) for cell in last}, flush=True)
    result = {
        "simulations": args.simulations,
        "resamples": args.resamples,
        "error": 100 * (0.95 * 0.05 / args.simulations) ** 0.5,
        stale.KEY: stale.stamp("src/preftune/stats/*.py", "benchmarks/coverage.py"),
        "versions": {"numpy": np.__version__, "python": sys.version.split()[0]},
        "seconds": round(time.perf_counter() - started, 1),
        "cells": cells,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = args.out.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, args.out)
    if args.document.exists():
        render(result, args.document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
