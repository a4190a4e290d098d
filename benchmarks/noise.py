"""Label noise: true reward of DPO, cDPO, robust DPO and IPO when a share of the labels is turned round: ``make noise``.

Completions are the same at every level, and the pairs flipped at one level are flipped at all higher ones, so that
levels differ in nothing but the noise. Robust DPO is told the true share; cDPO smooths by 0.1 or 0.2 whatever it is, as
practice has it. Each method has its own learning rate: the one of a small grid with the highest mean reward over all
levels on seeds that have no part in the verdict.

Cells go into a file beside the result one by one (``--go_on`` keeps them), and from the result into ``docs/noise.md``
and its picture. What may be said is laid down in `benchmarks.seeded`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.noise_page import best_rates, complete_seeds, plot, render

from benchmarks import seeded, stale, toy
from preftune.demo.training import DemoSettings

LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4)
METHODS = ("DPO", "cDPO 0.1", "cDPO 0.2", "robust", "IPO")
KEYS = ("stage", "method", "noise", "rate", "seed")
#: Learning rates that are tried, in multiples of the world's own, and at which levels.
RATES, TUNED_AT = (0.4, 1.0, 2.5), (0.0, 0.2, 0.4)
#: Seeds that rates are chosen on, and those of the verdict.
TUNING, SEEDS = (200, 210), (220, 230, 240, 250, 260, 270, 280, 290)
PATTERNS = (*stale.ENGINE, "src/preftune/demo/*.py", "benchmarks/noise.py", "benchmarks/toy.py", "benchmarks/seeded.py")
_BETA = 0.1


def fields_of(method: str, noise: float) -> dict[str, Any]:
    """Configuration of a method at a level of noise."""
    name, _, smoothing = method.partition(" ")
    loss = {"DPO": "sigmoid", "cDPO": "sigmoid", "robust": "robust", "IPO": "ipo"}[name]
    more = {"label_smoothing": float(smoothing)} if smoothing else {}
    if name == "robust":
        more = {"label_smoothing": noise}
    return {"loss_type": loss, "beta": _BETA, **more}


def is_plain(method: str, noise: float) -> bool:
    """Whether a method is plain DPO here, and is not trained again: robust DPO without noise."""
    return method == "robust" and not noise


def plan(levels: Sequence[float], tuning: Sequence[int], seeds: Sequence[int]) -> tuple[list[tuple[Any, ...]], ...]:
    """Cells that rates are chosen by, and cells of the verdict, without their rate; by seed, then by level."""
    first = [
        (seed, noise, method, rate)
        for seed in tuning
        for noise in levels
        if noise in TUNED_AT
        for method in METHODS
        if not is_plain(method, noise)
        for rate in RATES
    ]
    second = [
        (seed, noise, method) for seed in seeds for noise in levels for method in METHODS if not is_plain(method, noise)
    ]
    return first, second


class Runner:
    """Makes the bench of a seed and the pairs of a level when they are first needed."""

    def __init__(self, cells: seeded.Cells, settings: DemoSettings, folder: Path) -> None:
        self.cells, self.settings, self.folder = cells, settings, folder
        self.clock = toy.Clock()
        self._bench: Any = None
        self._pairs: dict[float, list[Any]] = {}

    def bench(self, seed: int) -> toy.Bench:
        """World, SFT model and pairs of a seed; one at a time."""
        if self._bench is None or self._bench.seed != seed:
            self._bench, self._pairs = toy.make_bench(seed, self.settings, self.folder), {}
            record = toy.scores_record(self._bench.before, self._bench.before, seed)
            record |= {"num_pairs": len(self._bench.pairs), "num_prompts": len(self._bench.prompts)}
            self.cells.report["references"][str(seed)] = record
            self.clock.say(f"seed {seed}: SFT, {len(self._bench.pairs)} pairs")
            self.cells.start()
        found: toy.Bench = self._bench
        return found

    def measure(self, stage: str, seed: int, noise: float, method: str, rate: float) -> None:
        """Train and score one cell, unless it is there."""
        from preftune.demo.pairs import make_pairs

        key = {"stage": stage, "method": method, "noise": noise, "rate": rate, "seed": seed}
        if self.cells.has(**key):
            return
        bench = self.bench(seed)
        if noise not in self._pairs:
            model = bench.reference, bench.tokenizer, bench.world
            self._pairs[noise] = (
                make_pairs(*model, self.settings.num_prompts, seed, label_noise=noise) if noise else bench.pairs
            )
            self.cells.start()
        pairs = self._pairs[noise]
        fields = {**fields_of(method, noise), "learning_rate": rate * self.settings.dpo_learning_rate}
        policy = toy.train(bench, "DPO", [pair.row() for pair in pairs], fields, self.folder / "trainer")
        cell = {**key, "fields": fields, "flipped": sum(pair.flipped for pair in pairs)}
        cell |= toy.scores_record(bench.score(policy), bench.before, seed)
        self.cells.enter(cell)
        self.clock.say(f"{stage}: {method} at {noise:.0%}, rate x{rate:g}: reward {toy.with_interval(cell['reward'])}")


def run(
    settings: DemoSettings,
    levels: tuple[float, ...],
    tuning: Sequence[int],
    seeds: Sequence[int],
    threads: int,
    out: Path,
    go_on: bool = False,
) -> dict[str, Any]:
    """Chooses rates and measures all methods at all levels.

    Args:
        settings: Sizes and rates.
        levels: Shares of flipped labels.
        tuning: Seeds that rates are chosen on.
        seeds: Of the verdict; of data, weights and samples, a whole experiment each.
        threads: Of torch.
        out: The result file.
        go_on: Keep what a run that was cut short has measured.

    Returns:
        The report.
    """
    import torch

    torch.set_num_threads(threads)
    head = {**toy.new_report(settings, threads), "levels": list(levels), "tuning": list(tuning)}
    head |= {"rates": list(RATES), "tuned_at": list(TUNED_AT)}
    del head["references"], head["cells"]
    cells = seeded.Cells(out, head, PATTERNS, KEYS, go_on)
    cells.report.setdefault("references", {})
    first, second = plan(levels, tuning, seeds)
    with toy.workplace() as folder:
        runner = Runner(cells, settings, folder)
        for seed, noise, method, rate in first:
            runner.measure("tuning", seed, noise, method, rate)
        rates = best_rates(cells.report)
        for seed, noise, method in second:
            runner.measure("verdict", seed, noise, method, rates[method])
    return cells.finish()


def main(argv: list[str] | None = None) -> int:
    """Measures, writes the JSON file, the document and the picture.

    Returns:
        1 if no seed is complete, so that there is nothing to show, else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuning", type=int, nargs="+", default=list(TUNING), help="seeds that rates are chosen on")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="seeds of the verdict")
    seeded.arguments(parser, toy.RESULTS / "noise.json", toy.DOCS / "noise.md")
    options = parser.parse_args(argv)
    if options.render:
        report = toy.read_report(options.out)
    else:
        seeds = toy.seeds_of(options.seeds)
        if set(seeds) & set(options.tuning):
            parser.error("a seed that rates are chosen on cannot be one of the verdict")
        settings = toy.tiny_settings() if options.quick else toy.default_settings()
        report = run(settings, LEVELS, options.tuning, seeds, options.threads, options.out, options.go_on)
    if not complete_seeds(report):
        print("no seed is complete: nothing to show yet", file=sys.stderr)
        return 1
    plot(report, options.document.parent / "images" / "noise.png")
    options.document.write_text(render(report), encoding="utf-8")
    print(f"wrote {options.document}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
