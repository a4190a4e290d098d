"""Do the advised settings do better than TRL's defaults on the true reward? ``python -m benchmarks.advice``.

In the demo's world, without noise and with 30 % of the labels turned round, the same SFT model is trained on the same
pairs five times: with TRL's defaults, with the nearest published recipe, with either at the learning rate that the
advice's own size rule gives it, and with what :func:`preftune.advice.advise` says about the data. Nothing is
typed by hand: TRL's defaults are read from the installed TRL, the recipe from its file, the advice is asked with the
noise estimate of ``preftune data audit`` (``--noise audit``) or with the share as such (``--noise told``). Pairs of
trainings share seed, model, pairs, prompts and sampling noise, and are compared prompt by prompt.

Results go into ``benchmarks/results/advice.json`` cell by cell, and from there, with those of ``benchmarks.memory``,
into ``docs/advice.md``. With ``--go_on`` a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import seeded, stale, toy

RESULTS = Path(__file__).resolve().parent / "results"
OUT = RESULTS / "advice.json"
LEVELS = (0.0, 0.3)
#: None of them was looked at while the rules were made: docs/noise.md has 0 and 10, trials ran on 101 and 102.
SEEDS = (30, 40, 50, 60, 70, 80, 90, 110, 120, 130, 140, 150, 160, 170, 180)
DEFAULTS, SCALED, ADVISED = "TRL's defaults", "TRL's defaults, rate scaled", "advised"
#: The recipe of the smallest model: alignment-handbook's for SmolLM2, 2 epochs below 1.7B.
RECIPE, RECIPE_SCALED = "nearest published recipe", "nearest published recipe, rate scaled"
CONTENDERS = (DEFAULTS, SCALED, RECIPE, RECIPE_SCALED, ADVISED)
PATTERNS = (*stale.ENGINE, "src/preftune/advice/*.py", "src/preftune/demo/*.py", "benchmarks/advice.py")
KEYS = ("contender", "noise", "seed")
#: Settings of the two libraries that are compared; the others of TRL's defaults have no bearing on the result.
FIELDS = (
    "loss_type",
    "beta",
    "learning_rate",
    "num_train_epochs",
    "label_smoothing",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "warmup_steps",
    "lr_scheduler_type",
    "max_length",
)
#: What is told stands for an audit that is right to within ten points.
_TOLD_WIDTH = 0.1


def trl_defaults() -> dict[str, Any]:
    """Defaults of the installed TRL, read from its class."""
    from trl import DPOConfig

    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(output_dir=folder, bf16=False, use_cpu=True, report_to="none")
    found = {name: getattr(config, name) for name in FIELDS}
    found["lr_scheduler_type"] = str(getattr(found["lr_scheduler_type"], "value", found["lr_scheduler_type"]))
    found["warmup_steps"] = found["warmup_steps"] or 0
    return found


def recipe_fields() -> dict[str, Any]:
    """The nearest published recipe for DPO with all weights, from its file, with the epochs of its small models."""
    import yaml

    from preftune import recipes

    file = Path(str(recipes.__file__)).with_name("smollm2-dpo.yaml")
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    found = {name: content[name] for name in FIELDS if name in content}
    # 128 pairs a step on eight devices, on one.
    found |= {"num_train_epochs": 2, "per_device_train_batch_size": 128, "gradient_accumulation_steps": 1}
    return found


def noise_of(rows: Sequence[dict[str, Any]], level: float, how: str, folder: Path) -> Any:
    """The noise estimate that the advice is given."""
    from preftune.advice import Noise
    from preftune.advice.case import noise_from_audit

    if how == "told":
        return Noise(level, max(0.0, level - _TOLD_WIDTH), level + _TOLD_WIDTH, "told")
    from preftune.cli.main import main as preftune

    data, out = folder / "pairs.jsonl", folder / "audit"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code = preftune(["data", "audit", "--dataset_name", str(data), "--out", str(out)])
    if code:
        raise RuntimeError(f"the audit ended with code {code}")
    return noise_from_audit(out / "audit.json")


def advised_fields(bench: toy.Bench, rows: Sequence[dict[str, Any]], noise: Any) -> dict[str, Any]:
    """What the advice says about this model and these pairs."""
    import numpy as np

    from preftune.advice import Case, Lengths, advise

    def tokens(name: str) -> Any:
        return np.array([len(bench.tokenizer(row[name], add_special_tokens=False)["input_ids"]) for row in rows])

    # Beginning and end of sequence.
    lengths = Lengths(tokens("prompt") + 1, tokens("chosen") + 1, tokens("rejected") + 1)
    size = sum(parameter.numel() for parameter in bench.reference.parameters())
    case = Case(
        "dpo",
        ("sigmoid",),
        size,
        num_pairs=len(rows),
        lengths=lengths,
        noise=noise,
        max_positions=bench.reference.config.max_position_embeddings,
    )
    return advise(case).values()


def fields_of(contender: str, bench: toy.Bench, rows: Sequence[dict[str, Any]], noise: Any) -> dict[str, Any]:
    """The settings of a contender."""
    from preftune.advice.scaling import rate_at_size, two_digits

    if contender == ADVISED:
        return advised_fields(bench, rows, noise)
    fields = recipe_fields() if contender in (RECIPE, RECIPE_SCALED) else trl_defaults()
    # Rows are shorter than the model's longest sequence, far below TRL's limit.
    fields["max_length"] = toy.COMMON["max_length"]
    if contender in (SCALED, RECIPE_SCALED):
        size = sum(parameter.numel() for parameter in bench.reference.parameters())
        at = {"published_at": 1.7e9} if contender == RECIPE_SCALED else {}
        fields["learning_rate"] = two_digits(rate_at_size(fields["learning_rate"], size, **at))
    return fields


def run(
    seeds: Sequence[int],
    levels: Sequence[float],
    contenders: Sequence[str],
    threads: int,
    how: str,
    out: Path,
    go_on: bool = False,
    settings: Any = None,
) -> dict[str, Any]:
    """Trains and scores what is missing in the result file.

    Args:
        seeds: Of data, weights and samples; an experiment each.
        levels: Shares of flipped labels.
        contenders: Whose settings.
        threads: Of torch.
        how: ``told`` or ``audit``.
        out: The result file.
        go_on: Keep what a run that was cut short has measured.
        settings: Sizes and rates; by default the toy's.

    Returns:
        The report.
    """
    from preftune.demo.pairs import make_pairs

    settings = settings or toy.default_settings()
    head = {**toy.new_report(settings, threads), "noise": how}
    del head["references"], head["cells"]
    kept = seeded.Cells(out, head, PATTERNS, KEYS, go_on)
    report = kept.report
    report.setdefault("references", {})
    clock = toy.Clock()
    with toy.workplace() as folder:
        for seed in seeds:
            done = {(cell["contender"], cell["noise"]) for cell in report["cells"] if cell["seed"] == seed}
            if {(contender, level) for contender in contenders for level in levels} <= done:
                continue
            bench = toy.make_bench(seed, settings, folder)
            toy.enter_reference(report, bench)
            clock.say(f"seed {seed}: SFT, {len(bench.pairs)} pairs")
            model = bench.reference, bench.tokenizer, bench.world
            for level in levels:
                pairs = make_pairs(*model, settings.num_prompts, seed, label_noise=level) if level else bench.pairs
                rows = [pair.row() for pair in pairs]
                noise = noise_of(rows, level, how, folder)
                kept.start()
                for contender in contenders:
                    if (contender, level) in done:
                        continue
                    fields = fields_of(contender, bench, rows, noise)
                    cell = measure(bench, rows, fields)
                    cell |= {
                        "contender": contender,
                        "noise": level,
                        "seed": seed,
                        "told": noise and [noise.estimate, noise.low, noise.high],
                    }
                    cell["seconds"] = clock.say(
                        f"{contender} at {level:.0%}: reward {toy.with_interval(cell['reward'])}, "
                        f"KL {cell['kl']['mean']:.2f}"
                    )
                    kept.enter(cell)
    return kept.finish()


def measure(bench: toy.Bench, rows: Sequence[dict[str, Any]], fields: dict[str, Any]) -> dict[str, Any]:
    """Trains with these fields and scores; keeps rewards prompt by prompt for the paired comparison.

    The reference's log-probs are computed for this cell alone. Taken from another cell, they would have the rounding
    of that one's rows, and a cell would depend on which others were measured before it.
    """
    with toy.workplace() as folder:
        scored = bench.score(toy.train(bench, "DPO", rows, fields, folder))
    by_prompt: dict[int, list[float]] = {}
    for sample, reward in zip(scored.samples, scored.rewards, strict=True):
        by_prompt.setdefault(sample.prompt_index, []).append(float(reward))
    rewards = [round(math.fsum(each) / len(each), 5) for _, each in sorted(by_prompt.items())]
    return {"fields": fields, **toy.scores_record(scored, bench.before, bench.seed), "rewards": rewards}


# ---- what it comes to ------------------------------------------------------------------------------------------------


def difference(report: dict[str, Any], level: float, against: str) -> seeded.Difference:
    """Advised minus another contender, paired by seed.

    What differs over seeds is data, SFT model, training and prompts alike; an interval over prompts alone would leave
    out what differs from one training to the next.

    Args:
        report: The result file.
        level: Share of flipped labels.
        against: The other contender.
    """
    ours, theirs = (
        seeded.by_seed(c for c in report["cells"] if (c["contender"], c["noise"]) == (name, level))
        for name in (ADVISED, against)
    )
    return seeded.difference(f"{level:.0%} flipped labels, against {against}", ours, theirs)


def summary(report: dict[str, Any]) -> str:
    """Tables and sentences for ``docs/advice.md``."""
    rows, settings, gaps = [], [], []
    for level in LEVELS:
        for contender in CONTENDERS:
            cells = [c for c in report["cells"] if c["contender"] == contender and c["noise"] == level]
            if not cells:
                continue
            pooled = toy.pooled(cells)
            row = [
                f"{level:.0%}",
                contender,
                toy.with_interval(pooled["reward"]),
                f"{pooled['kl']['mean']:.2f}",
                str(len(cells)),
            ]
            gap = difference(report, level, contender)
            if contender == ADVISED or gap.num < 2:
                row += ["", ""]
            else:
                row += [gap.text(4), str(gap.num)]
                gaps.append(gap)
            rows.append(row)
            settings.append([f"{level:.0%}", contender, _told(cells)])
    before = toy.pooled(list(report["references"].values()))
    how = {
        "told": "the true share, taken as known to within ten points",
        "audit": "the estimate of `preftune data audit` on the very pairs",
    }[report["noise"]]
    seeds = sorted({cell["seed"] for cell in report["cells"]})
    names = ", ".join(map(str, seeds))
    head = ["flipped", "settings", "true reward", "KL", "seeds", "advised minus this", "on seeds"]
    return "\n\n".join(
        [
            f"{len(seeds)} seeds ({names}), each with data, SFT model and trainings of its own. The SFT model before: "
            f"{toy.with_interval(before['reward'])}. The advice got {how}. Intervals of rewards are 95 % over prompts; "
            "those of differences are 95 % over seeds (Student), paired by seed and prompt, so that they hold what "
            "differs from one training to the next.",
            toy.markdown_table(head, rows),
            toy.markdown_table(["flipped", "settings", "what they were"], settings),
            "What may be said, by Student's t test over seeds at 5 %, after Holm's correction over these comparisons:",
            "\n".join(map(_verdict, gaps, seeded.verdicts(gaps))),
            toy.conditions(report).split("\n\n")[0] + "\n\n" + toy.conditions(report).split("\n\n")[-1],
        ]
    )


def _told(cells: Sequence[dict[str, Any]]) -> str:
    """Settings of a contender; several values where seeds differ."""
    told = []
    for name in FIELDS:
        values = [c["fields"][name] for c in cells if name in c["fields"]]
        shown = list(dict.fromkeys(f"{v:g}" if isinstance(v, float) else str(v).strip("[]'") for v in values))
        if shown:
            told.append(f"{name} {' or '.join(shown)}")
    return ", ".join(told)


def _verdict(gap: seeded.Difference, word: str) -> str:
    told = f"the advised settings are {word}" if word in ("better", "worse") else word
    return f"- At {gap.name}: {told} ({gap.num_above} of {gap.num} seeds above)."


def main(argv: list[str] | None = None) -> int:
    """Measures, writes the result file and renders the document.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="an experiment each")
    parser.add_argument("--levels", type=float, nargs="+", default=list(LEVELS), help="shares of flipped labels")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="whose settings")
    parser.add_argument("--noise", choices=("audit", "told"), default="told", help="where the advice knows it from")
    seeded.arguments(parser, OUT, toy.DOCS / "advice.md")
    options = parser.parse_args(argv)
    if options.render:
        report = toy.read_report(options.out)
    else:
        report = run(
            toy.seeds_of(options.seeds),
            options.levels,
            options.contenders,
            options.threads,
            options.noise,
            options.out,
            options.go_on,
            toy.tiny_settings() if options.quick else None,
        )
    from benchmarks.memory import place

    place(options.document, "reward", summary(report))
    print(f"wrote {options.document}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
