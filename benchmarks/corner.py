"""What a sweep picks where the best cell is a corner: ``python -m benchmarks.corner``.

In the demo's world, where the reward of a text is known exactly, a 3x3 sweep of beta and learning rate picks its sweet
spot from held-out pairs and samples alone; then every cell's policy is scored by the truth. The learning rates all lie
to one side: *timid*, where the highest is the best, and *bold*, where the lowest is. Every trial is sampled on 100 or
on 1,000 held-out prompts, which says whether more samples rule out good cells. Beside the sweet spot stand a rule that
looks at nothing (the middle rate, the lowest beta) and the trial with the highest held-out mean, whether it has left
the reference or not.

Cells go into a file beside the result (``--go_on`` keeps them), and from the result into ``docs/sweep.md``. A *loss* is
the true reward of the truly best cell less that of the cell that was picked; what may be said of two ways of picking is
laid down in `benchmarks.seeded`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.sweep import RESULTS, params_of

from benchmarks import seeded, stale, toy
from preftune.errors import SetupError

OUT = RESULTS / "corner.json"
DOCUMENT = toy.DOCS / "sweep.md"
KEYS = ("world", "num_samples", "seed")
SEEDS = (300, 310, 320, 330, 340, 350, 360, 370)
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "timid": {"beta": (0.05, 0.2, 0.8), "learning_rate": (1e-5, 5e-5, 2.5e-4)},
    "bold": {"beta": (0.05, 0.2, 0.8), "learning_rate": (2.5e-4, 1.25e-3, 6.25e-3)},
}
NUM_SAMPLES = (100, 1000)
PATTERNS = (
    *stale.ENGINE,
    "src/preftune/sweep/*.py",
    "src/preftune/demo/*.py",
    "benchmarks/corner.py",
    "benchmarks/sweep.py",
)
_SWEET, _FIXED, _HIGHEST = "sweet spot", "middle rate, lowest beta", "highest held-out mean"


def sweep_of(
    seed: int,
    settings: Any,
    folder: Path,
    grid: dict[str, tuple[float, ...]],
    num_samples: int,
    num_held_out: int,
    truths: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """One sweep in the demo's world, and the true reward of every cell.

    Args:
        seed: Of world, data, weights and samples.
        settings: Sizes and rates.
        folder: For everything.
        grid: What is searched.
        num_samples: Held-out prompts on which each trial is sampled.
        num_held_out: Held-out prompts.
        truths: True scores of policies by digest of their weights; those that are missing are added.
    """
    from preftune.cli.main import main as preftune
    from preftune.demo.pairs import make_pairs
    from preftune.demo.training import quiet

    bench = toy.make_bench(seed, settings, folder)
    for part in (bench.reference, bench.tokenizer):
        part.save_pretrained(folder / "model")
    # Pairs to choose by, apart from those that the truth is measured beside.
    choosing = make_pairs(
        bench.reference,
        bench.tokenizer,
        bench.world,
        num_held_out,
        seed + 1,
        split="heldout",
    )
    for name, pairs in (("train", bench.pairs), ("test", choosing)):
        lines = [json.dumps(pair.row()) for pair in pairs]
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    base = {
        **toy.COMMON,
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data"),
        "num_train_epochs": settings.dpo_epochs,
        "per_device_train_batch_size": settings.dpo_batch_size,
        "seed": seed,
    }
    del base["disable_tqdm"]
    (folder / "base.yaml").write_text(json.dumps(base), encoding="utf-8")
    out = folder / "sweep"
    command = ["sweep", "--config", str(folder / "base.yaml"), *params_of(grid), "--out", str(out)]
    command += ["--num_samples", str(num_samples), "--keep", "all"]
    started = time.perf_counter()
    code = preftune(command)
    if code:
        raise SetupError("the sweep failed", where=" ".join(command), value=code)
    seconds = time.perf_counter() - started
    result = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    with quiet():
        cells = [_true_cell(bench, trial, out, truths) for trial in result["trials"]]
    return _verdict(seed, cells, result, seconds, toy.scores_record(bench.before, bench.before, seed))


def _true_cell(bench: Any, trial: dict[str, Any], out: Path, truths: dict[str, dict[str, Any]]) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    shown = ("number", "params", "state", "metrics", "left_reference", "tied_with_best", "seconds")
    found = {key: trial[key] for key in shown}
    if trial["state"] != "complete":
        return {**found, "true": None}
    folder = out / trial["run"]
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if weights not in truths:
        policy = AutoModelForCausalLM.from_pretrained(folder)
        truths[weights] = toy.scores_record(bench.score(policy), bench.before, bench.seed)
    return {**found, "true": truths[weights]}


def _verdict(
    seed: int, cells: list[dict[str, Any]], result: dict[str, Any], seconds: float, before: dict[str, Any]
) -> dict[str, Any]:
    scored = [cell for cell in cells if cell["true"] is not None]
    best = max(scored, key=lambda cell: cell["true"]["reward"]["mean"])
    sweet = next(cell for cell in scored if cell["number"] == result["best"]["number"])
    reward, interval = sweet["true"]["reward"]["mean"], best["true"]["reward"]
    return {
        "seed": seed,
        "before": before,
        "cells": cells,
        "sweet_spot": sweet["number"],
        "highest_mean": result["best"]["highest_mean"],
        "truly_best": best["number"],
        "true_reward": reward,
        "true_reward_of_best": interval,
        "within": bool(interval["low"] <= reward),
        "reference_passes": result["reference_passes"],
        "seconds": round(seconds, 1),
    }


def picks(found: dict[str, Any], grid: dict[str, tuple[float, ...]]) -> dict[str, float]:
    """True reward of what each way picks, and of the truly best cell."""
    scored = {cell["number"]: cell for cell in found["cells"] if cell["true"] is not None}
    rewards = {number: cell["true"]["reward"]["mean"] for number, cell in scored.items()}
    middle = sorted(grid["learning_rate"])[1]
    fixed = next(
        (n for n, c in scored.items() if c["params"] == {"beta": min(grid["beta"]), "learning_rate": middle}), None
    )
    return {
        "best": max(rewards.values()),
        _SWEET: rewards[found["sweet_spot"]],
        # A trial that diverged has no policy; who picked it has the reference.
        _FIXED: found["before"]["reward"]["mean"] if fixed is None else rewards[fixed],
        _HIGHEST: rewards[found["highest_mean"]],
    }


def is_corner(found: dict[str, Any], grid: dict[str, tuple[float, ...]]) -> bool:
    """Whether the truly best cell is a corner of the grid."""
    params = next(cell["params"] for cell in found["cells"] if cell["number"] == found["truly_best"])
    return all(params[name] in (min(values), max(values)) for name, values in grid.items())


def run(
    out: Path,
    seeds: Sequence[int],
    num_samples: Sequence[int],
    threads: int,
    go_on: bool,
    quick: bool,
) -> dict[str, Any]:
    """Runs the sweeps that are missing, world by world.

    Args:
        out: The result file.
        seeds: Of data, weights and samples; a sweep each.
        num_samples: Held-out prompts on which each trial is sampled.
        threads: Of torch.
        go_on: Keep what a run that was cut short has measured.
        quick: Tiny sizes.

    Returns:
        The report.
    """
    import torch

    torch.set_num_threads(threads)
    settings = toy.tiny_settings() if quick else toy.default_settings()
    head = {
        **toy.new_report(settings, threads),
        "grids": {k: {n: list(v) for n, v in g.items()} for k, g in GRIDS.items()},
    }
    del head["references"], head["cells"]
    cells = seeded.Cells(out, head, PATTERNS, KEYS, go_on)
    clock = toy.Clock()
    for seed in seeds:
        for world, grid in GRIDS.items():
            truths: dict[str, dict[str, Any]] = {}
            for number in num_samples:
                key = {"world": world, "num_samples": number, "seed": seed}
                if cells.has(**key):
                    continue
                with toy.workplace() as folder:
                    # As many held-out prompts for both, so that only the samples differ; some give no pair.
                    held_out = round((1.6 if quick else 1.02) * max(num_samples))
                    found = sweep_of(seed, settings, folder, grid, number, held_out, truths)
                rewards = picks(found, grid)
                cells.enter({**key, "rewards": rewards, "corner": is_corner(found, grid), **found})
                clock.say(
                    f"{world}, {number} samples, seed {seed}: sweet spot {rewards[_SWEET]:.3f} of {rewards['best']:.3f}"
                )
    return cells.finish()


# ---- the document ---------------------------------------------------------------------------------------------------


def render(report: dict[str, Any]) -> str:
    """The section of ``docs/sweep.md``."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for cell in report["cells"]:
        groups.setdefault((cell["world"], cell["num_samples"]), []).append(cell)
    rows, gaps = [], []
    for (world, number), cells in groups.items():
        within = sum(cell["within"] for cell in cells)
        corners = sum(cell["corner"] for cell in cells)
        wrongly = sum(
            any(c["number"] == cell["truly_best"] and c["left_reference"] for c in cell["cells"]) for cell in cells
        )
        losses = {
            way: {cell["seed"]: cell["rewards"]["best"] - cell["rewards"][way] for cell in cells}
            for way in (_SWEET, _FIXED, _HIGHEST)
        }
        means = [f"{sum(each.values()) / len(each):.3f}" for each in losses.values()]
        rows.append(
            [world, f"{number:,}", f"{corners} of {len(cells)}", seeded.share(within, len(cells)), *means, str(wrongly)]
        )
        for way in (_FIXED, _HIGHEST):
            name = f"sweet spot against {way}; {world}, {number:,} samples"
            # A smaller loss is better.
            gaps.append(seeded.difference(name, losses[way], losses[_SWEET]))
    for world in dict.fromkeys(world for world, _ in groups):
        few, many = (
            {cell["seed"]: cell["rewards"][_SWEET] for cell in groups.get((world, number), [])}
            for number in NUM_SAMPLES
        )
        if few.keys() & many.keys():
            gaps.append(seeded.difference(f"1,000 samples against 100; {world}", many, few))
    words = seeded.verdicts(gaps)
    return "\n\n".join(
        [
            "**Where the best cell is a corner** (`benchmarks/results/sweep/corner.json`, "
            "`python -m benchmarks.corner`): learning rates that all lie to one side. Mean losses of true "
            "reward; *wrongly* are sweeps that ruled out "
            "the truly best cell.",
            toy.markdown_table(
                [
                    "rates",
                    "samples",
                    "best is a corner",
                    "within the best's interval",
                    *(f"loss: {way}" for way in (_SWEET, _FIXED, _HIGHEST)),
                    "wrongly",
                ],
                rows,
            ),
            toy.markdown_table(
                ["true reward", "difference, 95 % over seeds", "seeds above", "verdict"],
                [[g.name, g.text(), f"{g.num_above} of {g.num}", word] for g, word in zip(gaps, words, strict=True)],
            ),
            f"Better and worse by Student's t test over seeds at 5 %, after Holm's correction over these rows, on at "
            f"least {seeded.LEAST_SEEDS} seeds. {seeded.spent(report)}",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Measures and writes the result file and the section.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="a sweep each")
    parser.add_argument("--samples", type=int, nargs="+", default=list(NUM_SAMPLES), help="held-out prompts sampled on")
    seeded.arguments(parser, OUT, DOCUMENT)
    options = parser.parse_args(argv)
    if options.render:
        report = toy.read_report(options.out)
    else:
        seeds = toy.seeds_of(options.seeds)
        report = run(options.out, seeds, options.samples, options.threads, options.go_on, options.quick)
    seeded.place(options.document, "corner", render(report))
    print(f"wrote {options.document}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
