"""Do fewer pairs serve better? `preftune data select` beside all pairs: ``python -m benchmarks.selection``.

In the demo's review world, where the true reward is known, with 0 and 20 % of the labels turned round: DPO on all
pairs, on the half and the three quarters that models trained on the other half find easiest, and on a half and three
quarters drawn at random. Contenders train on their pairs with the same settings, so that fewer pairs are fewer steps;
one has as many steps as all pairs take.

Cells go into a file beside the result one by one (``--go_on`` keeps them), and from the result into
``docs/selection.md``. What may be said is laid down in `benchmarks.seeded`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import seeded, stale, toy
from preftune.data import DataOptions
from preftune.data.audit.rows import read_rows
from preftune.demo.training import DemoSettings
from preftune.runs.audit import pair_margins
from preftune.runs.selection import easiest, halves_of

OUT, PAGE = toy.RESULTS / "selection.json", toy.DOCS / "selection.md"
LEVELS = (0.0, 0.2)
SEEDS = (320, 330, 340, 350, 360, 370, 380, 390)
#: ``{name: (share, whether the easiest, whether with as many steps as all pairs take)}``
CONTENDERS: dict[str, tuple[float, bool, bool]] = {
    "all": (1.0, False, False),
    "easiest half": (0.5, True, False),
    "easiest half, as many steps": (0.5, True, True),
    "easiest three quarters": (0.75, True, False),
    "random half": (0.5, False, False),
    "random three quarters": (0.75, False, False),
}
KEYS = ("method", "noise", "seed")
PATTERNS = (
    *stale.ENGINE,
    "src/preftune/demo/*.py",
    "src/preftune/runs/selection.py",
    "benchmarks/selection.py",
    "benchmarks/toy.py",
)
_FIELDS: dict[str, Any] = {"loss_type": "sigmoid", "beta": 0.1}


class Level:
    """Pairs of a seed at a level of noise, and how well models trained on the other half find them.

    Args:
        bench: The seed's.
        noise: Share of labels that are turned round.
        folder: The trainer's.
    """

    def __init__(self, bench: toy.Bench, noise: float, folder: Path) -> None:
        from preftune.demo.pairs import make_pairs

        model = bench.reference, bench.tokenizer, bench.world
        self.bench, self.folder = bench, folder
        self.pairs = (
            make_pairs(*model, bench.settings.num_prompts, bench.seed, label_noise=noise) if noise else bench.pairs
        )
        self.halves = halves_of([pair.prompt for pair in self.pairs], bench.seed)
        self.margins = self._margins()

    def _margins(self) -> Any:
        options = DataOptions(max_length=toy.COMMON["max_length"])
        found = np.full(len(self.pairs), np.nan)
        for half in (0, 1):
            mine, others = (np.flatnonzero((self.halves == half) == own) for own in (True, False))
            policy = self.train(mine, {})
            read = read_rows([self.pairs[number].row() for number in others], options)
            after, before = (
                pair_margins(model, read, self.bench.tokenizer, options, quiet=True)[:, 0]
                for model in (policy, self.bench.reference)
            )
            found[others] = after - before
        return found

    def train(self, numbers: Any, more: dict[str, Any]) -> Any:
        """A policy trained on some of the pairs."""
        rows = [self.pairs[number].row() for number in numbers]
        return toy.train(self.bench, "DPO", rows, {**_FIELDS, **more}, self.folder)

    def chosen(self, method: str) -> tuple[Any, dict[str, Any]]:
        """Numbers of a contender's pairs, and what it sets."""
        keep, by_margin, as_many_steps = CONTENDERS[method]
        drawn = np.random.default_rng([self.bench.seed, 17]).random(len(self.pairs))
        numbers = np.flatnonzero(easiest(self.margins if by_margin else drawn, self.halves, keep))
        epochs = self.bench.settings.dpo_epochs
        return numbers, {"num_train_epochs": epochs / keep} if as_many_steps else {}


def measure(level: Level, method: str, noise: float) -> dict[str, Any]:
    """Train and score a contender."""
    numbers, more = level.chosen(method)
    bench = level.bench
    scored = toy.scores_record(bench.score(level.train(numbers, more)), bench.before, bench.seed)
    turned = np.array([pair.flipped for pair in level.pairs])
    counts = {"num_pairs": len(numbers), "turned": int(turned[numbers].sum()), "turned_of_all": int(turned.sum())}
    accuracy = float((level.margins > 0).mean())
    return {"method": method, "noise": noise, "seed": bench.seed, "judged_right": accuracy, **counts, **scored}


def run(
    settings: DemoSettings, levels: Sequence[float], seeds: Sequence[int], threads: int, out: Path, go_on: bool = False
) -> dict[str, Any]:
    """Measure all contenders at all levels.

    Args:
        settings: Sizes and rates.
        levels: Shares of labels that are turned round.
        seeds: Of data, weights and samples; a whole experiment each.
        threads: Of torch.
        out: The result file.
        go_on: Keep what a run that was cut short has measured.

    Returns:
        The report.
    """
    import torch

    torch.set_num_threads(threads)
    head = {**toy.new_report(settings, threads), "levels": list(levels)}
    del head["references"], head["cells"]
    cells = seeded.Cells(out, head, PATTERNS, KEYS, go_on)
    clock = toy.Clock()
    with toy.workplace() as folder:
        for seed in seeds:
            bench = None
            for noise in levels:
                missing = [name for name in CONTENDERS if not cells.has(method=name, noise=noise, seed=seed)]
                if not missing:
                    continue
                bench = bench or toy.make_bench(seed, settings, folder)
                level = Level(bench, noise, folder / "trainer")
                cells.start()
                for name in missing:
                    cells.enter(measure(level, name, noise))
                    reward = toy.with_interval(cells.report["cells"][-1]["reward"])
                    clock.say(f"seed {seed}, {noise:.0%} turned, {name}: reward {reward}")
    return cells.finish()


def render(report: dict[str, Any]) -> str:
    """The table and what may be said."""
    cells = report["cells"]
    found, lines = [], []
    for noise in report["levels"]:
        own = {name: [c for c in cells if c["method"] == name and c["noise"] == noise] for name in CONTENDERS}
        everything = seeded.by_seed(own["all"])
        for name, each in own.items():
            rewards = seeded.by_seed(each)
            turned = sum(cell["turned"] for cell in each) / max(1, sum(cell["num_pairs"] for cell in each))
            gap = None
            if name != "all":
                gap = seeded.difference(f"{name}, {noise:.0%}", rewards, everything)
                found.append(gap)
            lines.append((noise, name, each, turned, float(np.mean([*rewards.values()])), gap))
    words = dict(zip((each.name for each in found), seeded.verdicts(found), strict=True))
    table = [
        "| labels turned | trained on | pairs | of them turned | true reward | less that of all pairs | |",
        "|---:|---|---:|---:|---:|---|---|",
    ]
    for noise, name, each, turned, reward, gap in lines:
        pairs = float(np.mean([cell["num_pairs"] for cell in each]))
        told = (gap.text(), words[gap.name]) if gap else ("", "")
        table.append(f"| {noise:.0%} | {name} | {pairs:,.0f} | {turned:.1%} | {reward:.3f} | {told[0]} | {told[1]} |")
    seeds = len({cell["seed"] for cell in cells})
    right = [cell["judged_right"] for cell in cells if cell["method"] == "all"]
    head = (
        f"Means over {seeds} seeds; differences are paired by seed, with Student's 95 % intervals, and words follow "
        f"Holm's correction over the {len(found)} comparisons. Models trained on the other half find {min(right):.0%} "
        f"to {max(right):.0%} of the labels as they are written. {seeded.spent(report)}"
    )
    return "\n".join([*table, "", head])


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing, and write the page.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="a whole experiment each")
    seeded.arguments(parser, OUT, PAGE)
    options = parser.parse_args(argv)
    if options.render:
        report = toy.read_report(options.out)
    else:
        settings = toy.tiny_settings() if options.quick else toy.default_settings()
        report = run(settings, LEVELS, options.seeds, options.threads, options.out, options.go_on)
    seeded.place(options.document, "selection", render(report))
    print(f"wrote {options.document}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
