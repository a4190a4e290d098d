"""Do guards speak up when they should, and keep quiet when they should? ``python -m benchmarks.guards``.

Twenty healthy trainings in the demo's world, of several methods and strengths, on which no guard may fire; and for each
guard one that is made to misbehave in its way, on which that guard has to. Every guard watches every run. Results go
into a JSON file run by run, an interrupted benchmark goes on where it stopped, and ``docs/guards.md`` gets its table
from the file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import seeded, toy
from preftune.demo.training import DemoSettings

OUT = toy.RESULTS.parent / "guards.json"
DOCUMENT = toy.DOCS / "guards.md"
# Worlds from this number on: thresholds were chosen on those before.
_FIRST_WORLD, _NUM_WORLDS, _NUM_HEALTHY = 10, 4, 20
Row = dict[str, Any]

#: What all runs share beside ``toy.COMMON``: evidence often, and samples with it.
WATCHED: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "learning_rate": 2.5e-4,
    "logging_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 16,
    "eval_on_start": True,
    "generation_steps": 16,
    "num_generations": 64,
    "generation_max_new_tokens": 80,
}


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        label: What is done.
        trainer: "DPO", "KTO", "CPO" or "ORPO".
        fields: Of its configuration, beside the shared ones.
        guard: The guard that has to fire; empty for a healthy run.
        rows: Makes the training data from the world's pairs.
        held: Makes the held-out data from the world's, likewise.
        fault: Scales one batch's gradient: ``(step, factor)``.
    """

    label: str
    trainer: str
    fields: dict[str, Any] = field(default_factory=dict)
    guard: str = ""
    rows: Callable[[list[Row]], list[Row]] = list
    held: Callable[[list[Row]], list[Row]] = list
    fault: tuple[int, float] | None = None


HEALTHY = (
    Case("DPO, beta 0.1", "DPO", {"beta": 0.1}),
    Case("DPO, beta 0.05, 2 epochs", "DPO", {"beta": 0.05, "num_train_epochs": 2}),
    Case("DPO, beta 0.3", "DPO", {"beta": 0.3}),
    Case("DPO, label smoothing 0.1", "DPO", {"beta": 0.1, "label_smoothing": 0.1}),
    Case("IPO, beta 0.01", "DPO", {"loss_type": "ipo", "beta": 0.01}),
    Case("sigmoid_norm, beta 5", "DPO", {"loss_type": "sigmoid_norm", "beta": 5.0}),
    Case("APO-zero, beta 0.1", "DPO", {"loss_type": "apo_zero", "beta": 0.1}),
    Case("SimPO, beta 2", "CPO", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}),
    Case("ORPO, beta 0.1", "ORPO", {"beta": 0.1}),
    Case("KTO, beta 0.1", "KTO", {"beta": 0.1, "per_device_train_batch_size": 32}),
)


def longer_wins(rows: list[Row]) -> list[Row]:
    """The longer answer becomes the chosen one, whatever it says."""
    found = []
    for row in rows:
        short, long = sorted((row["chosen"], row["rejected"]), key=len)
        if len(short) < len(long):
            found.append({"prompt": row["prompt"], "chosen": long, "rejected": short})
    return found


def few(rows: list[Row]) -> list[Row]:
    """A handful of pairs."""
    return rows[:96]


def marked(rows: list[Row]) -> list[Row]:
    """Every chosen answer begins with the same sentence, which is all that a policy has to learn."""
    return [{**row, "chosen": f" I would buy it again.{row['chosen']}"} for row in rows]


def one_answer(rows: list[Row]) -> list[Row]:
    """The same answer is the chosen one everywhere."""
    return [{**row, "chosen": " The lid is very sturdy. I would buy it again."} for row in rows]


BAD = (
    Case(
        "learning rate 8 times too high, and chosen answers that give themselves away",
        "DPO",
        {"beta": 0.1, "learning_rate": 2e-3},
        "reward_jump",
        marked,
    ),
    Case(
        "learning rate 4 times too high, beta 0.02",
        "DPO",
        {"beta": 0.02, "learning_rate": 1e-3},
        "likelihood_displacement",
    ),
    Case(
        "learning rate 12 times too high, beta 0.01",
        "DPO",
        {"beta": 0.01, "learning_rate": 3e-3, "warmup_steps": 4},
        "over_optimisation",
    ),
    Case(
        "the longer answer always wins, beta 0.05, 2 epochs",
        "DPO",
        {"beta": 0.05, "learning_rate": 5e-4, "num_train_epochs": 2},
        "length_exploitation",
        longer_wins,
        longer_wins,
    ),
    Case(
        "one and the same chosen answer to every prompt, 2 epochs",
        "CPO",
        {"beta": 0.1, "learning_rate": 1e-3, "num_train_epochs": 2},
        "entropy_collapse",
        one_answer,
    ),
    Case(
        "96 pairs, 16 epochs",
        "DPO",
        {"beta": 0.05, "learning_rate": 5e-4, "num_train_epochs": 16, "logging_steps": 3, "eval_steps": 12},
        "overfitting",
        few,
    ),
    Case("one batch's loss 1000 times too large", "DPO", {"beta": 0.1}, "gradient_spike", fault=(30, 1e3)),
    Case("one batch's loss overflows", "DPO", {"beta": 0.1}, "non_finite", fault=(30, float("inf"))),
)


def settings() -> DemoSettings:
    """Sizes of the world: those of the toy benchmarks, with held-out pairs enough to test on."""
    return replace(toy.default_settings(), num_eval_prompts=300)


@dataclass(frozen=True)
class Place:
    """A world with its SFT model and pairs."""

    tokenizer: Any
    reference: Any
    train: list[Row]
    heldout: list[Row]


def make_place(seed: int, sizes: DemoSettings, folder: Path) -> Place:
    """World, SFT model, pairs to train on and held-out pairs, all from one seed."""
    from preftune.demo import models, pairs, training
    from preftune.demo.world import World

    world = World(seed)
    corpus = world.corpus(sizes.num_reviews)
    tokenizer = models.build_tokenizer(corpus)
    start = models.build_model(tokenizer, seed, sizes.hidden_size, sizes.num_layers)
    reference = training.train_sft(start, tokenizer, corpus, sizes, seed, folder / "sft")
    train = pairs.make_pairs(reference, tokenizer, world, sizes.num_prompts, seed)
    heldout = pairs.make_pairs(reference, tokenizer, world, sizes.num_eval_prompts, seed + 1, split="heldout")
    return Place(tokenizer, reference, [pair.row() for pair in train], [pair.row() for pair in heldout])


def unpaired(rows: list[Row], seed: int) -> list[Row]:
    """Pairs taken apart and shuffled."""
    found = [
        {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
        for row in rows
        for kind in ("chosen", "rejected")
    ]
    return [found[index] for index in np.random.default_rng([seed, 5]).permutation(len(found))]


def run_case(case: Case, place: Place, seed: int) -> dict[str, Any]:
    """Trains with all guards on and returns what they said."""
    from datasets import Dataset
    from transformers import PrinterCallback

    import preftune
    from preftune.demo.training import clone, quiet
    from preftune.training.guards import find_guards

    train, heldout = case.rows(place.train), case.held(place.heldout)
    if case.trainer == "KTO":
        train, heldout = unpaired(train, seed), unpaired(heldout, seed)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="preftune-guards-") as folder, quiet():
        trainer = getattr(preftune, f"{case.trainer}Trainer")(
            model=clone(place.reference),
            args=getattr(preftune, f"{case.trainer}Config")(
                **{**toy.COMMON, **WATCHED, "seed": seed, "output_dir": folder, **case.fields}
            ),
            train_dataset=Dataset.from_list(train),
            eval_dataset=Dataset.from_list(heldout),
            processing_class=place.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        if case.fault is not None:
            _break_gradient(trainer, *case.fault)
        guards = find_guards(trainer)
        assert guards is not None
        guards.say = lambda line: None
        trainer.train()
    alarms = [{key: alarm[key] for key in ("guard", "step", "message")} for alarm in guards.alarms]
    last: dict[str, Any] = {}
    for line in trainer.state.log_history:
        last.update({name: value for name, value in line.items() if name in _SHOWN})
    return {
        "alarms": alarms,
        "steps": trainer.state.global_step,
        "last": last,
        "seconds": time.perf_counter() - started,
    }


_SHOWN = ("eval_rewards/accuracies", "generation/kl", "generation/length", "generation/entropy")


def _break_gradient(trainer: Any, step: int, factor: float) -> None:
    """Let the loss of one step be ``factor`` times as large, as a damaged batch or an overflow makes it."""
    whole = trainer.step.backward

    def broken(loss: Any) -> None:
        whole(loss * factor if trainer.state.global_step + 1 == step else loss)

    trainer.step.backward = broken


def plan() -> list[tuple[Case, int, int]]:
    """All runs: case, world, training seed."""
    healthy = [
        (HEALTHY[number % len(HEALTHY)], _FIRST_WORLD + (number + number // len(HEALTHY)) % _NUM_WORLDS, 1000 + number)
        for number in range(_NUM_HEALTHY)
    ]
    return healthy + [(case, _FIRST_WORLD + number % _NUM_WORLDS, 1100 + number) for number, case in enumerate(BAD)]


def measure(out: Path, wanted: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs what is missing in the result file, which is written after every run."""
    sizes = settings()
    fresh = toy.new_report(sizes, threads=1)
    fresh = {**fresh, "watched": WATCHED}
    report = toy.continued(out, fresh)
    clock, places = toy.Clock(), {}
    with toy.workplace() as folder:
        for case, world, seed in plan():
            key = {"label": case.label, "world": world, "seed": seed}
            done = any(all(cell[name] == value for name, value in key.items()) for cell in report["cells"])
            if done or (wanted and not any(part in case.label or part == case.guard for part in wanted)):
                continue
            if world not in places:
                places[world] = make_place(world, sizes, folder)
                clock.say(f"world {world}: SFT, {len(places[world].train)} pairs")
            found = run_case(case, places[world], seed)
            toy.enter_cell(report, {**key, "guard": case.guard, "trainer": case.trainer, **found}, tuple(key))
            toy.write_report(seeded.without_nan(report), out)
            said = ", ".join(f"{alarm['guard']}@{alarm['step']}" for alarm in found["alarms"]) or "silent"
            clock.say(f"{case.label} (world {world}, seed {seed}): {said}")
    return report


# ---- the document ---------------------------------------------------------------------------------------------------


def render(report: dict[str, Any]) -> str:
    """The tables as Markdown."""
    from benchmarks.render import machine_text

    from preftune.training.guards import GUARD_NAMES

    healthy = [cell for cell in report["cells"] if not cell["guard"]]
    bad = {cell["guard"]: cell for cell in report["cells"] if cell["guard"]}
    rows = []
    for name in GUARD_NAMES:
        false = [cell for cell in healthy if any(alarm["guard"] == name for alarm in cell["alarms"])]
        cell = bad.get(name)
        fired, first, others = "not measured", "", ""
        if cell is not None:
            own = [alarm for alarm in cell["alarms"] if alarm["guard"] == name]
            fired = f"step {own[0]['step']} of {cell['steps']}" if own else "**did not fire**"
            first = own[0]["message"] if own else ""
            others = ", ".join(dict.fromkeys(alarm["guard"] for alarm in cell["alarms"] if alarm["guard"] != name))
        label = cell["label"] if cell else ""
        rows.append([f"`{name}`", label, fired, first, others or "-", seeded.share(len(false), len(healthy))])
    table = toy.markdown_table(
        [
            "guard",
            "run made to misbehave",
            "fires at",
            "what it says",
            "others that fire there",
            "alarms on healthy runs",
        ],
        rows,
    )
    counts: dict[str, list[dict[str, Any]]] = {}
    for cell in healthy:
        counts.setdefault(cell["label"], []).append(cell)
    lines = [
        [
            label,
            str(len(cells)),
            _mean(cells, "eval_rewards/accuracies"),
            _mean(cells, "generation/kl"),
            str(sum(len(cell["alarms"]) for cell in cells)),
        ]
        for label, cells in counts.items()
    ]
    more = toy.markdown_table(
        ["healthy runs", "runs", "held-out accuracy", "KL, nats", "alarms"], lines, right=(1, 2, 3, 4)
    )
    total = sum(cell["seconds"] for cell in report["cells"])
    note = (
        f"{len(healthy)} healthy runs in {len({cell['world'] for cell in healthy})} worlds, each with a training seed "
        f"of its own, and {len(bad)} made to misbehave; {total / max(len(report['cells']), 1):.0f} s a run. All guards "
        f"watch all runs. Environment: {machine_text(report['machine'])}"
    )
    return f"{table}\n\n{more}\n\n{note}\n"


def _mean(cells: list[dict[str, Any]], name: str) -> str:
    """Mean over cells; single answers have no accuracy."""
    values = [cell["last"][name] for cell in cells if cell["last"].get(name) is not None]
    return f"{float(np.mean(values)):.2f}" if values else "-"


def write_document(report: dict[str, Any], path: Path) -> None:
    """Puts the tables between the marks of the document."""
    seeded.place(path, "guards", render(report))


def main(argv: list[str] | None = None) -> int:
    """Measures and writes the result file and the document's tables.

    Returns:
        0, or 1 where a guard is silent on its run or fires on a healthy one.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="result file")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="document whose tables are written")
    parser.add_argument("--only", nargs="+", help="runs whose label contains one of these, or of these guards")
    parser.add_argument("--render", action="store_true", help="measure nothing; write the tables from the file")
    options = parser.parse_args(argv)
    report = toy.read_report(options.out) if options.render else measure(options.out, options.only)
    write_document(report, options.document)
    print(f"wrote {options.document}")
    wrong = [cell for cell in report["cells"] if bool(cell["alarms"]) != bool(cell["guard"])]
    wrong += [
        cell
        for cell in report["cells"]
        if cell["guard"] and all(alarm["guard"] != cell["guard"] for alarm in cell["alarms"])
    ]
    for cell in wrong:
        print(f"not as it should be: {cell['label']}, world {cell['world']}, seed {cell['seed']}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
