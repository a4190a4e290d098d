"""Beta against learning rate on a pretrained model and real pairs: ``python -m benchmarks.grid``.

A 3x3 sweep of ``preftune dpo`` with LoRA on SmolLM2-135M-Instruct (``make real``) and Anthropic HH pairs, once per
seed, which draws rows, held-out prompts and the order of training. Recorded are training loss, held-out accuracy and
margin per token with intervals over prompts, KL and tails of samples, the sweet spot, and the interaction of the two
settings.

The sweep's folder is kept under ``--work``, so that with ``--go_on`` a sweep that was cut short goes on with the trial
that it was in. Cells go from there into the result, and from that into ``docs/sweep.md``. The rule for words, laid down
before: beta and learning rate *interact* where the 95 % interval over prompts of the margin's contrast (high, high) -
(high, low) - (low, high) + (low, low) excludes 0 with the same sign on every seed. A cell is *the* sweet spot where all
seeds name it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import seeded, stale, sweep, toy
from preftune.errors import SetupError
from preftune.stats.intervals import bootstrap_mean
from preftune.sweep.scores import ACCURACY, KL, PER_TOKEN, TAIL, HeldOut

OUT = sweep.RESULTS / "grid.json"
DOCUMENT = toy.DOCS / "sweep.md"
KEYS = ("beta", "learning_rate", "seed")
SEEDS = (0, 1, 2)
GRID: dict[str, tuple[float, ...]] = {"beta": (0.05, 0.1, 0.3), "learning_rate": (5e-5, 2e-4, 8e-4)}
PATTERNS = (*stale.ENGINE, "src/preftune/sweep/*.py", "benchmarks/grid.py")
NUM_PAIRS, NUM_HELD_OUT, NUM_SAMPLES = 256, 128, 64
BASE: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "max_length": 512,
    "transcripts": "messages",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 4,
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": "all-linear",
    "bf16": True,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_steps": 4,
    "report_to": "none",
}


def one_sweep(
    seed: int, model: Path, rows: Sequence[dict[str, Any]], work: Path, num_held_out: int
) -> list[dict[str, Any]]:
    """The nine cells of a seed, from a sweep in a folder that is gone on with where it is there.

    Args:
        seed: Of the order and of everything in training.
        model: The model's folder.
        rows: Held-out pairs, then those to train on.
        work: Folder for data and sweep.
        num_held_out: How many of the rows are held out.
    """
    from preftune.cli.main import main as preftune

    data = work / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[num_held_out:]), ("test", rows[:num_held_out])):
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    base = {**BASE, "model_name_or_path": str(model), "dataset_name": str(data), "seed": seed}
    (work / "base.yaml").write_text(json.dumps(base), encoding="utf-8")
    out = work / "sweep"
    command = ["sweep", "--config", str(work / "base.yaml"), *sweep.params_of(GRID), "--out", str(out)]
    code = preftune([*command, "--keep", "none", "--num_samples", str(min(NUM_SAMPLES, num_held_out))])
    if code:
        raise SetupError("the sweep failed", where=" ".join(command), value=code)
    result = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    contrast = interaction(result["trials"], out)
    shown = ("number", "state", "metrics", "left_reference", "tied_with_best", "seconds")
    return [
        {
            **trial["params"],
            "seed": seed,
            **{name: trial[name] for name in shown},
            "sweet_spot": trial["number"] == result["best"]["number"],
            "interaction": contrast,
        }
        for trial in result["trials"]
    ]


def interaction(trials: Sequence[dict[str, Any]], folder: Path) -> dict[str, float] | None:
    """The contrast of the corners' margins per token, with its interval over prompts; ``None`` without all four."""
    total: Any = 0.0
    groups: list[int] = []
    for beta, one in ((max(GRID["beta"]), 1), (min(GRID["beta"]), -1)):
        for rate, two in ((max(GRID["learning_rate"]), 1), (min(GRID["learning_rate"]), -1)):
            run = next((t["run"] for t in trials if t["params"] == {"beta": beta, "learning_rate": rate}), None)
            held = HeldOut.load(folder / run) if run is not None else None
            if held is None:
                return None
            total = total + one * two * held.values(PER_TOKEN)
            groups = held.prompts.tolist()
    return bootstrap_mean(np.asarray(total), groups=groups, method="student", num_resamples=2000).as_dict()


def run(out: Path, seeds: Sequence[int], threads: int, go_on: bool, quick: bool, work: Path) -> dict[str, Any]:
    """Runs the sweeps that are missing.

    Args:
        out: The result file.
        seeds: A sweep each.
        threads: Of torch.
        go_on: Keep what a run that was cut short has measured.
        quick: A tiny random model and few pairs.
        work: Folder for the sweeps.

    Returns:
        The report.
    """
    import torch
    from transformers import AutoTokenizer

    from benchmarks import pretrained, workloads

    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    model = pretrained.folder_for(work, quick)
    tokenizer = AutoTokenizer.from_pretrained(model)
    num_pairs, num_held_out = (16, 8) if quick else (NUM_PAIRS, NUM_HELD_OUT)
    head = {
        "machine": sweep.machine_of(threads),
        "grid": {name: list(values) for name, values in GRID.items()},
        "settings": BASE,
        "model": "llama-1m, random" if quick else "SmolLM2-135M-Instruct, LoRA",
        "rows": workloads.source_of("hh"),
        "num_pairs": num_pairs,
        "num_held_out": num_held_out,
    }
    cells = seeded.Cells(out, head, PATTERNS, KEYS, go_on)
    clock = toy.Clock()
    for seed in seeds:
        if all(cells.has(beta=b, learning_rate=r, seed=seed) for b in GRID["beta"] for r in GRID["learning_rate"]):
            continue
        rows = workloads.make_rows("hh", num_pairs + num_held_out, tokenizer, seed=seed)
        place = work / f"{cells.report[stale.KEY]['digest'][:12]}-{seed}"
        before = seeded.processor_seconds()
        found = one_sweep(seed, model, rows, place, num_held_out)
        # All were trained together, and share what it took.
        each = round((seeded.processor_seconds() - before) / len(found), 1)
        for cell in found:
            cells.enter(cell)
            cell["processor_seconds"] = each
        cells.save()
        clock.say(f"seed {seed}: {sum(cell['seed'] == seed for cell in cells.report['cells'])} cells")
    return cells.finish()


# ---- the document ---------------------------------------------------------------------------------------------------


def _figure(cells: Sequence[dict[str, Any]], name: str, digits: int) -> str:
    found = [cell["metrics"][name]["mean"] for cell in cells if cell["metrics"].get(name)]
    values = [each for each in found if each is not None]
    return " ".join(f"{each:.{digits}f}" for each in values) or "-"


def told(seeds: Sequence[dict[str, float] | None]) -> str:
    """Whether the two settings interact, by the rule of this module."""
    if any(each is None for each in seeds) or not seeds:
        return "cannot be told: a corner of the grid has no held-out figures"
    known = [each for each in seeds if each is not None]
    if all(each["low"] > 0 for each in known):
        return "they interact: at a high beta a higher rate adds more to the margin than at a low one"
    if all(each["high"] < 0 for each in known):
        return "they interact: at a high beta a higher rate adds less to the margin than at a low one"
    return "no interaction can be told"


def render(report: dict[str, Any]) -> str:
    """The section of ``docs/sweep.md``."""
    seeds = sorted({cell["seed"] for cell in report["cells"]})
    rows, sweet = [], []
    for beta in report["grid"]["beta"]:
        for rate in report["grid"]["learning_rate"]:
            cells = [c for c in report["cells"] if (c["beta"], c["learning_rate"]) == (beta, rate)]
            cells.sort(key=lambda cell: cell["seed"])
            figures = [
                _figure(cells, name, digits)
                for name, digits in (("train_loss", 3), (ACCURACY, 2), (PER_TOKEN, 3), (KL, 1), (TAIL, 3))
            ]
            named = sum(cell["sweet_spot"] for cell in cells)
            left = sum(cell["left_reference"] for cell in cells)
            sweet.append((named, f"beta {beta:g}, learning rate {rate:g}"))
            rows.append([f"{beta:g}", f"{rate:g}", *figures, f"{left} of {len(cells)}", f"{named} of {len(cells)}"])
    contrasts = [next(c["interaction"] for c in report["cells"] if c["seed"] == seed) for seed in seeds]
    shown = "; ".join("-" if each is None else toy.with_interval(each) for each in contrasts)
    most, name = max(sweet)
    where = f"The sweet spot is {name}" if most == len(seeds) else f"Seeds differ; most often named is {name}"
    return "\n\n".join(
        [
            f"**On a pretrained model and real pairs** (`benchmarks/results/sweep/grid.json`, "
            f"`python -m benchmarks.grid`): {report['model']}, {report['num_pairs']} pairs to train on and "
            f"{report['num_held_out']} held out, {report['rows']}; one figure per seed ({', '.join(map(str, seeds))}).",
            toy.markdown_table(
                [
                    "beta",
                    "learning rate",
                    "training loss",
                    "held-out accuracy",
                    "margin, nats a token",
                    "KL, nats",
                    "far tail",
                    "left",
                    "sweet spot",
                ],
                rows,
            ),
            f"**Conclusion**, by rules laid down before. {where} ({most} of {len(seeds)} seeds). Beta and learning "
            f"rate: {told(contrasts)} (contrast of the corners' margins per token, 95 % over prompts: {shown}). "
            f"{seeded.spent(report)}",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Measures and writes the result file and the section.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="a sweep each")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "preftune-grid", help="for the sweeps"
    )
    seeded.arguments(parser, OUT, DOCUMENT)
    options = parser.parse_args(argv)
    if options.render:
        report = toy.read_report(options.out)
    else:
        seeds = toy.seeds_of(options.seeds)
        report = run(options.out, seeds, options.threads, options.go_on, options.quick, options.work)
    seeded.place(options.document, "grid", render(report))
    print(f"wrote {options.document}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
