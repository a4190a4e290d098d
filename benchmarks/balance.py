"""How evenly the pairs of a step are divided over processes, simulated: ``python -m benchmarks.balance``, seconds.

The tokens of the slowest process over the mean of all, for pairs in the order of the data, as a sampler without
lengths divides them, and divided by tokens. Writes ``benchmarks/results/balance.json`` and the table in docs/scale.md.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from benchmarks.cell import count_tokens

from benchmarks import stale, workloads
from preftune.training.balancing import share_of

HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "balance.json"
DOCS = HERE.parent / "docs" / "scale.md"
SOURCES = ("src/preftune/packing/plan.py", "src/preftune/training/balancing.py", "benchmarks/balance.py")
#: Data, processes, pairs of a process and step.
CASES = [
    *(("hh", 8, pairs) for pairs in (8, 4, 2, 1)),
    ("hh", 64, 8),
    *(("dpo_en", 8, pairs) for pairs in (8, 4, 2, 1)),
]
#: All rows of the published files that have an explicit prompt, at most.
ROWS = {"hh": 1_600, "dpo_en": 300}

Shares = Callable[[list[int], int, int], list[list[int]]]


def in_order(step: list[int], number: int, pairs: int) -> list[list[int]]:
    """Each process takes the next pairs."""
    return [step[start : start + pairs] for start in range(0, number * pairs, pairs)]


def slowest(costs: Sequence[int], number: int, pairs: int, divide: Shares) -> list[float]:
    """Slowest over mean, for every whole step of an epoch."""
    order = np.random.default_rng(0).permutation(len(costs)).tolist()
    size, found = number * pairs, []
    for start in range(0, len(order) - size + 1, size):
        loads = [sum(costs[n] for n in share) for share in divide(order[start : start + size], number, pairs)]
        found.append(max(loads) / mean(loads))
    return found


def measure() -> dict[str, Any]:
    """All cases."""
    costs: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as work:
        tokenizer = workloads.load_tokenizer(Path(work), "smollm2-135m")
        for name, number in ROWS.items():
            rows = workloads.make_rows(name, number, tokenizer)
            costs[name] = [sum(each) for each in count_tokens(rows, tokenizer, workloads.WORKLOADS[name].max_length)]
    cells, sources = [], {name: workloads.source_of(name) for name in ROWS}
    for name, number, pairs in CASES:

        def by_tokens(step: list[int], number: int, _: int, costs: list[int] = costs[name]) -> list[list[int]]:
            return [share_of([step], costs, (rank, number))[0] for rank in range(number)]

        before, after = (slowest(costs[name], number, pairs, divide) for divide in (in_order, by_tokens))
        cells.append(
            {
                "data": name,
                "processes": number,
                "pairs": pairs,
                "steps": len(before),
                "in_order": mean(before),
                "by_tokens": mean(after),
                "worst": max(after),
            }
        )
    return {stale.KEY: stale.stamp(*SOURCES), "rows": ROWS, "sources_of_rows": sources, "cells": cells}


def table(report: dict[str, Any]) -> str:
    """The table of docs/scale.md."""
    lines = [
        "| data | processes | pairs of each | steps | in the order of the data | divided by tokens | worst step |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for cell in report["cells"]:
        figures = " | ".join(f"{cell[name]:.2f}" for name in ("in_order", "by_tokens", "worst"))
        lines.append(f"| {cell['data']} | {cell['processes']} | {cell['pairs']} | {cell['steps']} | {figures} |")
    lines += ["", "Rows: " + "; ".join(f"`{name}`: {text}" for name, text in report["sources_of_rows"].items()) + "."]
    return "\n".join(lines)


def into_docs(mark: str, text: str) -> None:
    """Put a text between its marks in docs/scale.md."""
    page = DOCS.read_text(encoding="utf-8")
    marked = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    assert marked.search(page), mark
    DOCS.write_text(marked.sub(lambda found: found[1] + text + "\n" + found[2], page), encoding="utf-8")


def main() -> int:
    """Simulate, and write results and table."""
    report = measure()
    OUT.write_text(json.dumps(report, indent=1) + "\n")
    into_docs("balance", table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
