"""Turned labels on a pretrained model and real pairs: ``python -m benchmarks.flips``.

Anthropic HH pairs, of which 0 to 30 % are turned round on top of what their annotators disagree on. Two questions:

* What does ``preftune data audit`` say? Its judges are a Bradley-Terry model on words and surface, the same with the
  log-probs of SmolLM2-135M-Instruct (``make real``), and with those of that model tuned by DPO on *other* pairs, which
  is a small reward model. How many labels were wrong before is unknown, so that what counts is what an estimate gains.
* What do cDPO and robust DPO gain where 30 % are turned, told the true share? Measured is the accuracy of the implicit
  reward on pairs that were held out and not turned.

Cells go into a file beside the result one by one (``--go_on`` keeps them), and from the result into ``docs/flips.md``.
What may be said is laid down in `benchmarks.seeded`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import audit, seeded, stale, sweep, toy

OUT, PAGE = audit.RESULT.parent / "flips.json", toy.DOCS / "flips.md"
LEVELS = (0.0, 0.1, 0.2, 0.3)
ESTIMATE_SEEDS = tuple(range(8))
GAIN_SEEDS = (0, 1, 2)
JUDGES = ("words", "words and untuned model", "words and tuned model")
#: ``{name: (share turned, what it sets)}``
METHODS: dict[str, tuple[float, dict[str, Any]]] = {
    "DPO, nothing turned": (0.0, {}),
    "DPO": (0.3, {}),
    "cDPO": (0.3, {"label_smoothing": 0.3}),
    "robust": (0.3, {"loss_type": "robust", "label_smoothing": 0.3}),
}
KEYS = ("name", "level", "seed")
PATTERNS = (*stale.ENGINE, "src/preftune/data/audit/*.py", "src/preftune/evaluation/scoring.py", "benchmarks/flips.py")
#: Pairs that are held out, audited, and that the tuned judge learns from; a method trains on some of the audited.
SIZES = {"held out": 128, "audited": 1000, "judge": 384, "trained": 256}
QUICK = {"held out": 8, "audited": 64, "judge": 16, "trained": 16}
SETTINGS: dict[str, Any] = {
    "beta": 0.1,
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 1,
    "warmup_steps": 4,
    "lr_scheduler_type": "cosine",
    "max_length": 512,
    "transcripts": "messages",
    "bf16": True,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def turned(rows: Sequence[dict[str, Any]], level: float, seed: int) -> tuple[list[dict[str, Any]], Any]:
    """Rows of which a share has chosen and rejected exchanged, and which."""
    which = np.zeros(len(rows), dtype=bool)
    which[np.random.default_rng([seed, 5]).permutation(len(rows))[: round(level * len(rows))]] = True
    exchanged = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if own else row
        for row, own in zip(rows, which, strict=True)
    ]
    return exchanged, which


class Bench:
    """Model, pairs, and the margins that judges go by.

    Args:
        folder: The model's.
        tokenizer: The model's.
        rows: Pairs with a prompt; those of a prompt that is held out are left out elsewhere.
        sizes: As :data:`SIZES`.
        work: For trainers.
    """

    def __init__(
        self, folder: Path, tokenizer: Any, rows: Sequence[dict[str, Any]], sizes: dict[str, int], work: Path
    ) -> None:
        self.folder, self.tokenizer, self.sizes, self.work = folder, tokenizer, sizes, work
        self.held_out = list(rows[: sizes["held out"]])
        seen = {str(row["prompt"]) for row in self.held_out}
        others = [row for row in rows[sizes["held out"] :] if str(row["prompt"]) not in seen]
        self.audited = others[: sizes["audited"]]
        self._of_judge = others[sizes["audited"] :][: sizes["judge"]]
        self._margins: dict[str, Any] = {"words": None}

    def train(self, rows: Sequence[dict[str, Any]], more: dict[str, Any], seed: int) -> Any:
        """The model with an adapter that DPO has tuned."""
        from datasets import Dataset
        from peft import LoraConfig

        from preftune import DPOConfig, DPOTrainer

        args = DPOConfig(output_dir=str(self.work / "trainer"), seed=seed, **{**SETTINGS, **more})
        trainer = DPOTrainer(
            model=self.untuned(),
            args=args,
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=self.tokenizer,
            peft_config=LoraConfig(**LORA),
        )
        trainer.train()
        return trainer.model

    def scored(self, model: Any, rows: Sequence[dict[str, Any]]) -> Any:
        """How much likelier a model finds chosen than rejected, ``(rows, 2)``."""
        from preftune.data import DataOptions
        from preftune.data.audit.rows import read_rows
        from preftune.runs.audit import pair_margins

        options = DataOptions(max_length=SETTINGS["max_length"], transcripts=SETTINGS["transcripts"])
        read = read_rows(list(rows), options, tokenizer=self.tokenizer)
        return pair_margins(model, read, self.tokenizer, options, bf16=True, quiet=True)

    def untuned(self) -> Any:
        """The model as it was published."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder)

    def margins(self, judge: str) -> Any:
        """What a judge of the audit goes by besides words, computed once."""
        if judge not in self._margins:
            model = self.untuned() if judge == JUDGES[1] else self.train(self._of_judge, {}, 0)
            self._margins[judge] = self.scored(model, self.audited)
        return self._margins[judge]


def estimated(bench: Bench, judge: str, level: float, seed: int) -> dict[str, Any]:
    """What the audit says of the audited pairs."""
    from preftune.data import DataOptions
    from preftune.data.audit.noise import estimate_noise
    from preftune.data.audit.rows import read_rows

    rows, which = turned(bench.audited, level, seed)
    margins = bench.margins(judge)
    if margins is not None:
        margins = np.where(which[:, None], -margins, margins)
    _, found = estimate_noise(read_rows(rows, DataOptions()), ref_margins=margins, seed=seed)
    names = ("estimate", "low", "high", "told", "judge", "agreement", "judges")
    return {"name": judge, "level": level, "seed": seed, **{name: found[name] for name in names}}


def gained(bench: Bench, name: str, seed: int, before: Any) -> dict[str, Any]:
    """How many held-out pairs a method gets right."""
    level, more = METHODS[name]
    numbers = np.random.default_rng([seed, 3]).permutation(len(bench.audited))[: bench.sizes["trained"]]
    rows, _ = turned([bench.audited[number] for number in numbers], level, seed)
    gains = (bench.scored(bench.train(rows, more, seed), bench.held_out) - before)[:, 0]
    gains = gains[np.isfinite(gains)]
    accuracy = float((gains > 0).mean())
    return {"name": name, "level": level, "seed": seed, "accuracy": {"mean": accuracy}, "num_pairs": len(gains)}


def run(out: Path, gain_seeds: Sequence[int], threads: int, go_on: bool, quick: bool) -> dict[str, Any]:
    """Measures what is missing.

    Args:
        out: The result file.
        gain_seeds: All methods are trained for each.
        threads: Of torch.
        go_on: Keep what a run that was cut short has measured.
        quick: A tiny random model and few pairs.

    Returns:
        The report.
    """
    import torch
    from transformers import AutoTokenizer

    from benchmarks import pretrained, workloads

    torch.set_num_threads(threads)
    sizes = QUICK if quick else SIZES
    with toy.workplace() as work:
        folder = pretrained.folder_for(work, quick)
        head = {
            "machine": sweep.machine_of(threads),
            "model": "llama-1m, random" if quick else "SmolLM2-135M-Instruct, LoRA",
            "rows": workloads.source_of("hh"),
            "sizes": sizes,
            "settings": SETTINGS | LORA,
        }
        cells = seeded.Cells(out, head, PATTERNS, KEYS, go_on)
        # A few more than are needed, for those that share a prompt with one that is held out.
        needed = sizes["held out"] + sizes["audited"] + sizes["judge"]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rows = workloads.make_rows("hh", needed + needed // 20, tokenizer)
        bench = Bench(folder, tokenizer, rows, sizes, work)
        clock = toy.Clock()
        for judge in JUDGES:
            for level in LEVELS:
                for seed in ESTIMATE_SEEDS:
                    if not cells.has(name=judge, level=level, seed=seed):
                        cells.enter(estimated(bench, judge, level, seed))
            clock.say(f"{judge}: {len(cells.report['cells'])} cells")
        before = None
        for seed in gain_seeds:
            for name, (level, _) in METHODS.items():
                if not cells.has(name=name, level=level, seed=seed):
                    before = bench.scored(bench.untuned(), bench.held_out) if before is None else before
                    cells.start()
                    cells.enter(gained(bench, name, seed, before))
                    clock.say(f"seed {seed}, {name}: {cells.report['cells'][-1]['accuracy']['mean']:.3f}")
        return cells.finish()


# ---- the section ----------------------------------------------------------------------------------------------------


def _estimates(cells: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for judge in JUDGES:
        for level in LEVELS:
            own = [cell for cell in cells if (cell["name"], cell["level"]) == (judge, level)]
            told = [cell["estimate"] for cell in own if cell["told"]]
            middle = f"{np.mean(told):.0%} ({min(told):.0%} to {max(told):.0%})" if told else "-"
            ends = f"{np.mean([c['low'] for c in own]):.0%} to {np.mean([c['high'] for c in own]):.0%}"
            agreement = f"{np.mean([cell['agreement'] for cell in own]):.1%}"
            rows.append([judge, f"{level:.0%}", agreement, ends, f"{len(told)} of {len(own)}", middle])
    return rows


def _gains(report: dict[str, Any]) -> list[str]:
    cells, sizes = report["cells"], report["sizes"]
    found = {name: seeded.by_seed([c for c in cells if c["name"] == name], "accuracy") for name in METHODS}
    if not found["DPO"]:
        return []
    gaps = {name: seeded.difference(name, found[name], found["DPO"]) for name in METHODS if name != "DPO"}
    words = dict(zip(gaps, seeded.verdicts([*gaps.values()]), strict=True))
    rows = []
    for name, values in found.items():
        shown = " ".join(f"{each:.3f}" for _, each in sorted(values.items()))
        told = [gaps[name].text(), words[name]] if name in gaps else ["", ""]
        rows.append([name, f"{METHODS[name][0]:.0%}", shown, *told])
    return [
        f"**What methods gain**, trained on {sizes['trained']} of these pairs and judged on {sizes['held out']} that "
        "are held out and not turned; cDPO and robust are told the share that was turned. One figure per seed.",
        toy.markdown_table(["method", "turned", "held-out accuracy", "less that of DPO", ""], rows),
    ]


def render(report: dict[str, Any]) -> str:
    """The page."""
    cells, sizes = report["cells"], report["sizes"]
    of_judges = [cell for cell in cells if cell["name"] in JUDGES]
    text = "\n\n".join(
        [
            "# Turned labels on real pairs",
            f"Written by `python -m benchmarks.flips` from `benchmarks/results/audit/flips.json`: {sizes['audited']:,} "
            f"pairs of {report['rows']}, of which a share is turned round on top of what annotators disagree on; "
            f"{report['model']}; the tuned model is trained on {sizes['judge']} other pairs. Means over "
            f"{len({cell['seed'] for cell in of_judges})} draws of which labels are turned.",
            toy.markdown_table(
                ["the audit sees", "turned besides", "agrees", "mean interval", "told", "estimate, where told"],
                _estimates(cells),
            ),
            f"The audit gives a number in {sum(cell['told'] for cell in of_judges)} of {len(of_judges)} cases.",
            *_gains(report),
            seeded.spent(report),
        ]
    )
    return text.rstrip() + "\n"


def main(argv: list[str] | None = None) -> int:
    """Measures and writes the result file and the section.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gain_seeds", type=int, nargs="*", default=list(GAIN_SEEDS), help="all methods for each")
    seeded.arguments(parser, OUT, PAGE)
    options = parser.parse_args(argv)
    if options.render:
        report = toy.read_report(options.out)
    else:
        report = run(options.out, options.gain_seeds, options.threads, options.go_on, options.quick)
    options.document.write_text(render(report), encoding="utf-8")
    print(f"wrote {options.document}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
