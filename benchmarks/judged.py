"""How often corrected win rates hold the truth, in simulation: ``python -m benchmarks.judged``.

People's verdicts on 400 comparisons are drawn from a known win rate, a judge's from those with known error rates; a
part has human labels. The table says in how many per cent of the draws each interval held the true win rate, and how
wide it was: of the judge alone, of the labels alone, and of the two corrections. It goes to
``benchmarks/results/evaluation/judged.json`` and into ``docs/evaluation.md``. A few minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import seeded, stale
from preftune.evaluation.corrected import by_error_rates, by_residuals
from preftune.files import write_json
from preftune.stats.intervals import Interval, proportion_interval

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "evaluation" / "judged.json"
DOCUMENT = HERE.parent / "docs" / "evaluation.md"
NUM_COMPARISONS = 400
LABELS = (20, 30, 50, 100, 200)
#: Share of ties, win rate among the others, and how often the judge is right on losses and on wins; a tie it calls
#: a win, a tie or a loss with equal chances.
WORLDS: dict[str, tuple[float, float, float, float]] = {
    "even, a good judge": (0.0, 0.5, 0.9, 0.9),
    "even, a lenient judge": (0.0, 0.5, 0.7, 0.9),
    "70 %, a lenient judge": (0.0, 0.7, 0.7, 0.9),
    "70 %, a poor judge": (0.0, 0.7, 0.65, 0.65),
    "90 %, a very good judge": (0.0, 0.9, 0.97, 0.97),
    "90 %, a good judge": (0.0, 0.9, 0.85, 0.85),
    "70 %, a fifth ties, a lenient judge": (0.2, 0.7, 0.7, 0.9),
}
METHODS = ("judge alone", "labels alone", "residuals", "error rates")

Array = np.ndarray[Any, np.dtype[np.float64]]


def draw(rng: np.random.Generator, num: int, world: tuple[float, float, float, float]) -> tuple[Array, Array]:
    """People's verdicts and the judge's, 1 for a win, 0.5 for a tie."""
    ties, share, specificity, sensitivity = world
    people = (rng.random(num) < share).astype(float)
    judge = np.where(people == 1, rng.random(num) < sensitivity, rng.random(num) >= specificity).astype(float)
    tied = rng.random(num) < ties
    people[tied], judge[tied] = 0.5, rng.integers(0, 3, size=int(tied.sum())) / 2
    return people, judge


def intervals(
    rng: np.random.Generator, num_labels: int, world: tuple[float, float, float, float]
) -> list[Interval | None]:
    """One draw's intervals, in the order of :data:`METHODS`."""
    people, judge = draw(rng, NUM_COMPARISONS, world)
    labels = np.where(np.arange(NUM_COMPARISONS) < num_labels, people, math.nan)
    # Labels of other comparisons, as many wins as losses.
    told, tried = draw(rng, num_labels, (world[0], 0.5, *world[2:]))
    return [
        proportion_interval(judge),
        proportion_interval(people[:num_labels]),
        by_residuals(judge, labels),
        by_error_rates(judge, tried, told),
    ]


def measure(name: str, num_labels: int, num_simulations: int) -> list[dict[str, Any]]:
    """Coverage and mean width of every method; all see the same draws."""
    world = WORLDS[name]
    truth = 0.5 * world[0] + (1 - world[0]) * world[1]
    found = [
        intervals(np.random.default_rng([40, num_labels, simulation]), num_labels, world)
        for simulation in range(num_simulations)
    ]
    cells = []
    for number, method in enumerate(METHODS):
        given = [each for draws in found if (each := draws[number]) is not None]
        cells.append(
            {
                "world": name,
                "labels": num_labels,
                "method": method,
                "coverage": sum(each.low <= truth <= each.high for each in given) / len(given) if given else None,
                "width": sum(each.high - each.low for each in given) / len(given) if given else None,
                "told": len(given) / num_simulations,
            }
        )
    return cells


def table(cells: list[dict[str, Any]]) -> str:
    """The cells as a Markdown table: per cent of coverage, and the mean width in points."""
    sizes = sorted({cell["labels"] for cell in cells})
    found = {(cell["world"], cell["method"], cell["labels"]): cell for cell in cells}
    lines = [
        "| true win rate, judge | interval | " + " | ".join(f"{size} labels" for size in sizes) + " |",
        "|---|---|" + "---:|" * len(sizes),
    ]
    for world, method in dict.fromkeys((cell["world"], cell["method"]) for cell in cells):
        shown = []
        for size in sizes:
            cell = found[world, method, size]
            if cell["coverage"] is None:
                shown.append("-")
                continue
            text = f"{100 * cell['coverage']:.1f}, {100 * cell['width']:.0f}"
            shown.append(text if cell["told"] == 1 else f"{text} ({100 * cell['told']:.0f})")
        lines.append(f"| {world} | {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def render(result: dict[str, Any], document: Path) -> None:
    """Put the table between its marks in the document."""
    corrected = [c for c in result["cells"] if c["method"] in METHODS[2:] and c["coverage"] is not None]
    lowest = min(c["coverage"] for c in corrected)
    note = (
        f"Per cent of {result['simulations']:,} simulations each whose 95 % interval held the truth (standard error "
        f"{result['error']:.1f} points), and its mean width in points; in brackets, where it is not all, the per cent "
        f"in which there was one. {NUM_COMPARISONS} comparisons. The lowest coverage of a corrected interval is "
        f"{100 * lowest:.1f} %. {result[stale.KEY]['date']}."
    )
    seeded.place(document, "judged", f"{note}\n\n{table(result['cells'])}")


def main(argv: list[str] | None = None) -> int:
    """Simulate, write the JSON and the document.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--render", action="store_true", help="only put the stored table into the document")
    args = parser.parse_args(argv)
    if not args.render:
        cells = [
            cell for name in WORLDS for num_labels in LABELS for cell in measure(name, num_labels, args.simulations)
        ]
        result = {
            "simulations": args.simulations,
            "error": 100 * (0.95 * 0.05 / args.simulations) ** 0.5,
            stale.KEY: stale.stamp(
                "src/preftune/evaluation/corrected.py", "src/preftune/stats/*.py", "benchmarks/judged.py"
            ),
            "versions": {"numpy": np.__version__, "python": sys.version.split()[0]},
            "cells": cells,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, result, indent=1)
    render(json.loads(args.out.read_text(encoding="utf-8")), args.document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
