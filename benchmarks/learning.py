"""Does every method learn? True reward and KL before and after, for each row of the methods table: ``make learning``.

All methods of a seed start from the same SFT model and see the same pairs, with the settings their papers publish,
except for the learning rate and the batch, which are the toy's. Results go into a JSON file cell by cell, and from
there into ``docs/learning.md``; no figure in it is written by hand. A later run with other methods or seeds adds to the
file as long as sizes, versions and processor are the same.

A quick look:    python -m benchmarks.learning --methods sigmoid kto --out /tmp/learning.json --docs /tmp
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import seeded, stale, toy
from preftune.demo.training import DemoSettings
from preftune.errors import ConfigError

KEYS = ("label", "seed")
PATTERNS = (*stale.ENGINE, "src/preftune/demo/*.py", "benchmarks/learning.py", "benchmarks/toy.py")
SEEDS = (0, 1, 2, 3, 4)
# Of published settings: those of the toy's own training, and the weight within a mixture of losses.
_NOT_TAKEN = {"learning_rate", "batch_size", "warmup_steps", "epochs", "loss_weight"}
# Sharpness of the Bradley-Terry model that turns reward gaps into win probabilities; the demo's default.
_SHARPNESS = 10.0


@dataclass(frozen=True)
class Recipe:
    """One row of the table.

    Attributes:
        label: Name of the row.
        method: ``loss_type`` of the methods table.
        trainer: "DPO", "KTO", "CPO" or "ORPO".
        fields: Of the trainer's configuration, beside those that all rows share.
        note: What differs from the published settings, and why; empty where nothing does.
    """

    label: str
    method: str
    trainer: str
    fields: dict[str, Any]
    note: str = ""


# What the table of methods has no published value for, and what else there is to say about a method.
_REMARKS: dict[str, tuple[dict[str, Any], str]] = {
    "odpo": ({"beta": 0.1}, "beta: the default; score gap: difference of true rewards"),
    "sppo_soft": ({}, f"win probability: sigmoid of {_SHARPNESS:g} times the difference of true rewards"),
    "alphapo": ({"beta": 2.0, "simpo_gamma": 1.0, "alpha": 0.25}, "beta and gamma: those of simpo"),
    "simpo": ({"cpo_alpha": 0.0}, ""),
    "cpo_hinge": ({"beta": 0.1}, "beta: the default"),
    "cpo_ipo": ({"beta": 0.1}, "beta: the default"),
    "sft": ({}, "beta has no effect"),
    "discopop": (
        {},
        "with this tau the loss rises with h around h = 0, where training starts: its first steps turn the preference "
        "round",
    ),
    "apo_down": (
        {},
        "pushes the chosen completion down as well, for models that are better than the data; here the data are the "
        "model's own samples",
    ),
    "kto": ({}, "the pairs, taken apart and shuffled"),
    "apo_zero_unpaired": ({}, "the pairs, taken apart and shuffled"),
}

# A second row for methods whose published settings do not carry over to the toy.
_ADJUSTED: dict[str, tuple[dict[str, Any], str]] = {
    "discopop": ({"discopop_tau": 1.0}, "tau above 0.1, where the loss falls with h at h = 0 as well"),
    "apo_down": (
        {"beta": 1.0, "learning_rate": 5e-5},
        "a larger beta bounds how far both completions are pushed down, a lower rate how fast",
    ),
}


def published_recipe(method: str) -> Recipe:
    """The row of a method with its published settings.

    Raises:
        ConfigError: A published setting is neither a field of the trainer nor the method's default.
    """
    import preftune
    from preftune.objectives import METHODS
    from preftune.training.reference_free_config import CPO_METHODS

    spec = METHODS[method]
    fields: dict[str, Any]
    if method == "orpo":
        trainer, fields = "ORPO", {}
    elif spec.family == "reference_free":
        trainer, fields = "CPO", {"loss_type": {name: key for key, name in CPO_METHODS.items()}[method]}
    else:
        trainer, fields = ("DPO" if spec.paired else "KTO"), {"loss_type": method}
    known = {field.name for field in dataclasses.fields(getattr(preftune, f"{trainer}Config"))}
    for name, value in spec.defaults.items():
        if name in known - _NOT_TAKEN:
            fields[name] = value
        elif name not in _NOT_TAKEN and spec.knobs[name].default != value:
            raise ConfigError("a published setting cannot be set", where=f"{method}: {name}", value=value)
    more, note = _REMARKS.get(method, ({}, ""))
    return Recipe(method, method, trainer, {**fields, **more}, note)


def recipes() -> list[Recipe]:
    """All rows, in the order of the methods table."""
    from preftune.objectives import METHODS

    found = []
    for method in METHODS:
        recipe = published_recipe(method)
        found.append(recipe)
        if method in _ADJUSTED:
            fields, note = _ADJUSTED[method]
            merged = {**recipe.fields, **fields}
            found.append(Recipe(f"{method}, adjusted", method, recipe.trainer, merged, note))
    return found


def rows_for(recipe: Recipe, pairs: list[Any], seed: int) -> list[dict[str, Any]]:
    """The pairs in the columns that a method reads."""
    if recipe.trainer == "KTO":
        rows = [
            {"prompt": pair.prompt, "completion": text, "label": label}
            for pair in pairs
            for text, label in ((pair.chosen, True), (pair.rejected, False))
        ]
        return [rows[index] for index in np.random.default_rng([seed, 5]).permutation(len(rows))]
    rows = [pair.row() for pair in pairs]
    if recipe.method in ("odpo", "sppo_soft"):
        for row, pair in zip(rows, pairs, strict=True):
            gap = pair.reward_chosen - pair.reward_rejected
            # The difference of the two win probabilities, 2 sigmoid(x) - 1, is tanh(x / 2).
            row["margin"] = gap if recipe.method == "odpo" else float(np.tanh(_SHARPNESS * gap / 2))
    return rows


def measure(recipe: Recipe, bench: toy.Bench, folder: Path) -> dict[str, Any]:
    """Trains and scores one row on one seed."""
    fields = dict(recipe.fields)
    if recipe.trainer == "KTO":
        # An example is half a pair: as many completions a step as everywhere else.
        fields["per_device_train_batch_size"] = 2 * bench.settings.dpo_batch_size
    policy = toy.train(bench, recipe.trainer, rows_for(recipe, bench.pairs, bench.seed), fields, folder)
    scored = toy.scores_record(bench.score(policy), bench.before, bench.seed)
    identity = {"label": recipe.label, "method": recipe.method, "trainer": recipe.trainer, "note": recipe.note}
    return {**identity, "seed": bench.seed, "fields": fields, **scored}


def run(
    settings: DemoSettings, chosen: list[Recipe], seeds: list[int], threads: int, out: Path, go_on: bool = False
) -> dict[str, Any]:
    """Measures rows and keeps each as soon as it is measured.

    Args:
        settings: Sizes and rates.
        chosen: Rows.
        seeds: Of data, weights and samples; a whole experiment each.
        threads: Of torch.
        out: The result file.
        go_on: Keep what a run that was cut short has measured.

    Returns:
        The report.
    """
    head = toy.new_report(settings, threads)
    del head["references"], head["cells"]
    cells = seeded.Cells(out, head, PATTERNS, KEYS, go_on)
    report = cells.report
    report.setdefault("references", {})
    clock = toy.Clock()
    with toy.workplace() as folder:
        for seed in seeds:
            missing = [recipe for recipe in chosen if not cells.has(label=recipe.label, seed=seed)]
            if not missing:
                continue
            bench = toy.make_bench(seed, settings, folder)
            toy.enter_reference(report, bench)
            clock.say(f"seed {seed}: SFT, {len(bench.pairs)} pairs, reward {toy.with_interval(report_of(bench))}")
            cells.start()
            for recipe in missing:
                cell = measure(recipe, bench, folder / "trainer")
                cell["seconds"] = clock.say(
                    f"{recipe.label}: reward {toy.with_interval(cell['reward'])}, KL {cell['kl']['mean']:.2f}, "
                    f"grammatical {cell['grammatical']:.2f}"
                )
                cells.enter(cell)
    return cells.finish()


def report_of(bench: toy.Bench) -> dict[str, float]:
    """The reference's reward."""
    found: dict[str, float] = bench.before.reward.as_dict()
    return found


# ---- the document ---------------------------------------------------------------------------------------------------


def verdict(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Whether the reward rose beyond its interval, and if not, what the measurements say about why."""
    if toy.risen(before, after):
        return "yes"
    rise = after["rise"]
    if rise["low"] > 0:
        lead = "no: it rose, prompt by prompt, but the intervals before and after overlap"
    elif rise["high"] < 0:
        lead = "no: it fell"
    else:
        lead = "no: no difference can be told"
    reasons = []
    lost = before["grammatical"] - after["grammatical"]
    if lost > 0.05:
        reasons.append(
            f"sentences of the world fell from {100 * before['grammatical']:.0f} to {100 * after['grammatical']:.0f} % "
            f"at {after['kl']['mean']:.1f} nats from the reference: it went too far"
        )
    elif after["kl"]["mean"] < 0.5:
        reasons.append(f"only {after['kl']['mean']:.2f} nats from the reference: it hardly moved")
    if after["accuracy"]["high"] < 0.55:
        reasons.append(f"held-out accuracy {after['accuracy']['mean']:.2f}: it does not tell chosen from rejected")
    return f"{lead}. " + "; ".join(reasons) if reasons else lead


def settings_text(cell: dict[str, Any]) -> str:
    """A row's settings, with its note."""
    hidden = {"loss_type", "per_device_train_batch_size"}
    # Every trainer's own default, where nothing was set.
    fields = {"beta": 0.1, **cell["fields"]}
    recipe = next((recipe for recipe in recipes() if recipe.label == cell["label"]), None)
    # A remark may be reworded after a measurement, as long as it is about the same settings.
    note = recipe.note if recipe and recipe.fields.items() <= fields.items() else cell["note"]
    text = ", ".join(f"{name} {value:g}" for name, value in fields.items() if name not in hidden)
    return "; ".join(part for part in (text, note) if part) or "-"


def render(report: dict[str, Any]) -> str:
    """``docs/learning.md`` as text."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in report["cells"]:
        groups.setdefault(cell["label"], []).append(cell)
    order = {recipe.label: index for index, recipe in enumerate(recipes())}
    rows, counts, first_rows = [], [0, 0], [0, 0]
    several = len({cell["seed"] for cell in report["cells"]}) > 1
    for label in sorted(groups, key=lambda label: order.get(label, len(order))):
        cells = groups[label]
        before = toy.pooled([report["references"][str(cell["seed"])] for cell in cells])
        after = toy.pooled(cells)
        up = toy.risen(before, after)
        for count in (counts, first_rows)[: 1 + (label == cells[0]["method"])]:
            count[0], count[1] = count[0] + up, count[1] + 1
        rows.append(
            [
                f"`{label}`" if label == cells[0]["method"] else f"`{cells[0]['method']}`, adjusted",
                cells[0]["trainer"],
                settings_text(cells[0]),
                toy.with_interval(before["reward"]),
                toy.with_interval(after["reward"]),
                *([" ".join(f"{cell['reward']['mean']:.3f}" for cell in cells)] if several else []),
                toy.with_interval(after["kl"], 2),
                f"{after['accuracy']['mean']:.2f}",
                f"{100 * after['grammatical']:.0f} %",
                verdict(before, after),
            ]
        )
    headers = ["method", "trainer", "settings", "reward before", "reward after", "KL", "accuracy", "in the language"]
    headers.append("risen beyond its interval?")
    if several:
        headers.insert(5, "single seeds")
    seeds = sorted({cell["seed"] for cell in report["cells"]})
    missing = [f"`{label}`" for label in order if label not in groups]
    parts = [
        "# Does every method learn?",
        "Rendered by `benchmarks/learning.py` from `benchmarks/results/toy/learning.json`; repeat it with "
        "`make learning`.",
        toy.conditions(report),
        _reading(seeds),
        f"**Result.** With published settings {first_rows[0]} of {first_rows[1]} methods raise the true reward beyond "
        f"its interval; of all rows, adjusted ones included, {counts[0]} of {counts[1]}.",
        toy.markdown_table(headers, rows, right=(6 + several, 7 + several)),
    ]
    if missing:
        parts.append(f"Not measured: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def _reading(seeds: list[int]) -> str:
    names = ", ".join(map(str, seeds))
    number = f"one seed ({names})" if len(seeds) == 1 else f"{len(seeds)} seeds ({names})"
    varies = (
        "how much a row varies from one training run to the next is not in them, "
        if len(seeds) == 1
        else "how much a row varies from one training run to the next is in the column *single seeds* and not in them, "
    )
    return (
        "**How to read it.** Settings are the published ones of `preftune methods`, unless the row says otherwise. "
        f"Intervals are 95 % over prompts, from {number}; {varies}"
        "and the order of rows whose intervals overlap means nothing. *Risen* is the strict reading: the "
        "low end after lies above the high end before. KL before is 0: policy and reference are the same model. "
        "*Accuracy*: share of held-out pairs that the log-ratio to the reference ranks rightly (0.50 before). "
        "*In the language*: share of sentences that belong to the review world. No method was tuned; where published "
        "settings fail, a second row *adjusted* says what was changed, by reasoning rather than search, and the first "
        "row stays."
    )


def main(argv: list[str] | None = None) -> int:
    """Measures, writes the JSON file and the document.

    Returns:
        0.
    """
    from preftune.objectives import METHODS, find_method

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="rows of these methods (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="a whole experiment each")
    seeded.arguments(parser, toy.RESULTS / "learning.json", toy.DOCS / "learning.md")
    options = parser.parse_args(argv)
    if options.render:
        report = toy.read_report(options.out)
    else:
        methods = [find_method(name).name for name in options.methods or METHODS]
        chosen = [recipe for recipe in recipes() if recipe.method in methods]
        settings = toy.tiny_settings() if options.quick else toy.default_settings()
        seeds = toy.seeds_of(options.seeds)
        report = run(settings, chosen, seeds, options.threads, options.out, options.go_on)
    options.document.write_text(render(report), encoding="utf-8")
    print(f"wrote {options.document}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
