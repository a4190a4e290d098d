"""How often guards find a fault, by its size, and how often they cry wolf: ``python -m benchmarks.detection``.

Every fault has a dial: a learning rate that is too high by so much, a share of the pairs that mislead, fewer and fewer
pairs. All guards watch all trainings. Ten trainings at every size, each in a world of its own; and sixty healthy ones,
to which ``--pretrained`` adds some of the pretrained model on real pairs. None of the worlds had a part in choosing
thresholds.

Cells go into a file beside the result (``--go_on`` keeps them), and from the result into ``docs/guards.md``. The rule
for words, laid down before: a guard *finds* a fault from the smallest size on at which the low end of the 95 % interval
of its detection rate (Wilson) is above one half, and at all larger sizes too.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.guards import Case, Row

from benchmarks import guards, seeded, stale, toy
from preftune.stats.intervals import wilson_interval

OUT, PAGE = toy.RESULTS.parent / "detection.json", toy.DOCS / "guards.md"
KEYS = ("guard", "size", "label", "world", "seed")
PATTERNS = (
    *stale.ENGINE,
    "src/preftune/demo/*.py",
    "benchmarks/detection.py",
    "benchmarks/guards.py",
    "benchmarks/seeded.py",
)
#: Thresholds were chosen on worlds below 10.
FIRST_WORLD, NUM_SEEDS, NUM_HEALTHY = 20, 10, 60
_RATE = 2.5e-4


@dataclass(frozen=True)
class Dial:
    """A fault of several sizes.

    Attributes:
        guard: Who has to find it.
        what: What is turned.
        sizes: From small to large.
        case: The training at a size.
    """

    guard: str
    what: str
    sizes: tuple[float, ...]
    case: Callable[[float], Case]


def partly(change: Callable[[list[Row]], list[Row]], share: float, rows: list[Row]) -> list[Row]:
    """The change in the first pairs, as many as the share says, and the others as they are."""
    number = round(share * len(rows))
    return [*change(rows[:number]), *rows[number:]]


def first(number: float, rows: list[Row]) -> list[Row]:
    """A handful of pairs."""
    return rows[: int(number)]


def _hot(beta: float, guard: str, rows: Callable[[list[Row]], list[Row]], times: float, **more: Any) -> Case:
    return Case(guard, "DPO", {"beta": beta, "learning_rate": times * _RATE, **more}, guard, rows)


def _lengths(share: float) -> Case:
    change = partial(partly, guards.longer_wins, share)
    fields = {"beta": 0.05, "learning_rate": 2 * _RATE, "num_train_epochs": 2}
    return Case("length_exploitation", "DPO", fields, "length_exploitation", change, change)


def _answers(share: float) -> Case:
    fields = {"beta": 0.1, "learning_rate": 4 * _RATE, "num_train_epochs": 2}
    rows = partial(partly, guards.one_answer, share)
    return Case("entropy_collapse", "CPO", fields, "entropy_collapse", rows)


def _pairs(reciprocal: float) -> Case:
    fields = {"beta": 0.05, "learning_rate": 2 * _RATE, "num_train_epochs": 16, "logging_steps": 3, "eval_steps": 12}
    return Case("overfitting", "DPO", fields, "overfitting", partial(first, 768 / reciprocal))


def _gradient(guard: str, factor: float) -> Case:
    return Case(guard, "DPO", {"beta": 0.1}, guard, fault=(30, factor))


DIALS = (
    Dial(
        "reward_jump",
        "learning rate, times the world's; chosen answers give themselves away",
        (1, 2, 4, 8),
        partial(_hot, 0.1, "reward_jump", guards.marked),
    ),
    Dial(
        "likelihood_displacement",
        "learning rate, times the world's; beta 0.02",
        (1, 2, 4),
        partial(_hot, 0.02, "likelihood_displacement", list),
    ),
    Dial(
        "over_optimisation",
        "learning rate, times the world's; beta 0.01",
        (2, 4, 12),
        partial(_hot, 0.01, "over_optimisation", list, warmup_steps=4),
    ),
    Dial("length_exploitation", "share of the pairs in which the longer answer wins", (0.25, 0.5, 1), _lengths),
    Dial("entropy_collapse", "share of the pairs with one and the same chosen answer", (0.25, 0.5, 1), _answers),
    Dial("overfitting", "768 pairs divided by; 16 epochs", (2, 4, 8), _pairs),
    Dial("gradient_spike", "one batch's loss, times", (10, 30, 100, 1000), partial(_gradient, "gradient_spike")),
    Dial("non_finite", "one batch's loss overflows", (float("inf"),), partial(_gradient, "non_finite")),
)


def plan(num_seeds: int = NUM_SEEDS, num_healthy: int = NUM_HEALTHY) -> list[tuple[str, float, Case, int, int]]:
    """All trainings in the toy's worlds: guard, size, case, world and training seed; world by world."""
    found = [
        ("", 0.0, guards.HEALTHY[number % len(guards.HEALTHY)], number // len(guards.HEALTHY), 2000 + number)
        for number in range(num_healthy)
    ]
    number = 3000
    for dial in DIALS:
        for size in dial.sizes:
            for seed in range(num_seeds):
                found.append((dial.guard, size, dial.case(size), seed, number))
                number += 1
    worlds = [(guard, size, case, FIRST_WORLD + world, seed) for guard, size, case, world, seed in found]
    return sorted(worlds, key=lambda each: each[3])


def run(
    out: Path, num_seeds: int, num_healthy: int, num_pretrained: int, threads: int, go_on: bool, quick: bool
) -> dict[str, Any]:
    """Measures what is missing.

    Args:
        out: The result file.
        num_seeds: Trainings of each size of a fault.
        num_healthy: Healthy trainings in the toy's worlds.
        num_pretrained: Healthy trainings of the pretrained model.
        threads: Of torch.
        go_on: Keep what a run that was cut short has measured.
        quick: Tiny sizes.

    Returns:
        The report.
    """
    import torch

    torch.set_num_threads(threads)
    sizes = toy.tiny_settings() if quick else guards.settings()
    head = {**toy.new_report(sizes, threads), "watched": guards.WATCHED}
    del head["references"], head["cells"]
    cells = seeded.Cells(out, head, PATTERNS, KEYS, go_on)
    clock, place, at = toy.Clock(), None, None
    with toy.workplace() as folder:
        for guard, size, case, world, seed in plan(num_seeds, num_healthy):
            key = {"guard": guard, "size": str(size), "label": case.label, "world": world, "seed": seed}
            if cells.has(**key):
                continue
            if place is None or at != world:
                place, at = guards.make_place(world, sizes, folder), world
                cells.start()
            _enter(cells, clock, key, guards.run_case(case, place, seed))
        for number in range(num_pretrained):
            key = {"guard": "", "size": "0.0", "label": "pretrained on HH", "world": -1, "seed": 4000 + number}
            if not cells.has(**key):
                _enter(cells, clock, key, pretrained_run(4000 + number, folder))
    return cells.finish()


def _enter(cells: seeded.Cells, clock: toy.Clock, key: dict[str, Any], found: dict[str, Any]) -> None:
    cells.enter({**key, **found})
    said = ", ".join(f"{alarm['guard']}@{alarm['step']}" for alarm in found["alarms"]) or "silent"
    clock.say(f"{key['label']}, size {key['size']} (world {key['world']}, seed {key['seed']}): {said}")


def pretrained_run(seed: int, folder: Path, num_pairs: int = 192, num_held_out: int = 64) -> dict[str, Any]:
    """A healthy training of all weights of the pretrained model, on HH pairs in an order of the seed's own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks import pretrained, workloads

    where = pretrained.folder_of()
    tokenizer = AutoTokenizer.from_pretrained(where)
    rows = workloads.make_rows("hh", num_pairs + num_held_out, tokenizer, seed=seed)
    place = guards.Place(
        tokenizer, AutoModelForCausalLM.from_pretrained(where), rows[num_held_out:], rows[:num_held_out]
    )
    fields = {
        "beta": 0.1,
        "learning_rate": 5e-6,
        "max_length": 512,
        "transcripts": "messages",
        "per_device_train_batch_size": 8,
        "eval_steps": 12,
        "generation_steps": 12,
        "num_generations": 16,
        "generation_max_new_tokens": 48,
    }
    return guards.run_case(replace(guards.HEALTHY[0], fields=fields), place, seed)


# ---- the document ---------------------------------------------------------------------------------------------------


def found_from(rates: Sequence[tuple[float, int, int]]) -> float | None:
    """The smallest size from which on a fault is found, by the rule of this module; ``None`` where it is not."""
    size = None
    for each, hits, total in reversed(rates):
        if total < 2 or wilson_interval(hits, total).low <= 0.5:
            break
        size = each
    return size


def rates_of(report: dict[str, Any], dial: Dial) -> list[tuple[float, int, int]]:
    """Size, trainings in which the guard spoke, trainings; those sizes that were measured."""
    found = []
    for size in dial.sizes:
        cells = [c for c in report["cells"] if c["guard"] == dial.guard and c["size"] == str(size)]
        hits = sum(any(alarm["guard"] == dial.guard for alarm in cell["alarms"]) for cell in cells)
        if cells:
            found.append((size, hits, len(cells)))
    return found


def render(report: dict[str, Any]) -> str:
    """The section of ``docs/guards.md``."""
    healthy = [cell for cell in report["cells"] if not cell["guard"]]
    rows, told = [], []
    for dial in DIALS:
        rates = rates_of(report, dial)
        false = sum(any(alarm["guard"] == dial.guard for alarm in cell["alarms"]) for cell in healthy)
        shown = "; ".join(f"{size:g}: {seeded.share(hits, total)}" for size, hits, total in rates)
        rows.append([f"`{dial.guard}`", dial.what, shown or "not measured", seeded.share(false, len(healthy))])
        start = found_from(rates)
        if rates:
            told.append(f"`{dial.guard}` {'is not shown to find it' if start is None else f'from {start:g} on'}")
    false_runs = sum(bool(cell["alarms"]) for cell in healthy)
    real = sum(cell["world"] < 0 for cell in healthy)
    more = f", {real} of them of the pretrained model on real pairs" if real else ""
    return "\n\n".join(
        [
            f"**By size of the fault** (`benchmarks/results/detection.json`, `python -m benchmarks.detection`). "
            f"Trainings in which the guard spoke, with the 95 % interval of the share, and false alarms on "
            f"{len(healthy)} healthy trainings{more}.",
            toy.markdown_table(["guard", "dial", "size: found", "false alarms"], rows),
            f"**Conclusion**, by the rule that the low end of the interval is above one half at this and all larger "
            f"sizes, faults are found: {'; '.join(told)}. Any guard spoke on "
            f"{seeded.share(false_runs, len(healthy))} healthy trainings.",
            "**What it says** at the largest size, in the first training in which it spoke, and who else speaks there.",
            words_table(report),
            healthy_table(healthy),
            seeded.spent(report),
        ]
    )


def words_table(report: dict[str, Any]) -> str:
    """What guards say, and which others speak at the largest size of their fault."""
    rows = []
    for dial in DIALS:
        cells = [c for c in report["cells"] if c["guard"] == dial.guard and c["size"] == str(dial.sizes[-1])]
        own = [(cell, alarm) for cell in cells for alarm in cell["alarms"] if alarm["guard"] == dial.guard]
        others = Counter(name for cell in cells for name in {a["guard"] for a in cell["alarms"]} - {dial.guard})
        at = f"step {own[0][1]['step']} of {own[0][0]['steps']}" if own else "**did not speak**"
        beside = ", ".join(f"`{name}` ({number} of {len(cells)})" for name, number in others.most_common())
        if cells:
            rows.append([f"`{dial.guard}`", at, own[0][1]["message"] if own else "", beside or "-"])
    return toy.markdown_table(["guard", "speaks at", "what it says", "others that speak there"], rows)


def healthy_table(cells: Sequence[dict[str, Any]]) -> str:
    """Healthy trainings by what was trained: how they ended, and the alarms of each."""
    rows = []
    for label in dict.fromkeys(cell["label"] for cell in cells):
        own = [cell for cell in cells if cell["label"] == label]
        ended = [_mean(own, "eval_rewards/accuracies"), _mean(own, "generation/kl")]
        names = Counter(alarm["guard"] for cell in own for alarm in cell["alarms"])
        alarms = ", ".join(f"`{name}` ({number})" for name, number in names.items()) or "-"
        rows.append([label, str(len(own)), *ended, alarms])
    headers = ["healthy trainings", "runs", "held-out accuracy", "KL, nats", "alarms"]
    return toy.markdown_table(headers, rows, right=(1, 2, 3))


def _mean(cells: Sequence[dict[str, Any]], name: str) -> str:
    """Mean over cells; single answers have no accuracy."""
    values = [cell["last"][name] for cell in cells if cell["last"].get(name) is not None]
    return f"{mean(values):.2f}" if values else "-"


def main(argv: list[str] | None = None) -> int:
    """Measures and writes the result file and the section.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help="trainings of each size (default: 10)")
    parser.add_argument("--healthy", type=int, default=NUM_HEALTHY, help="healthy trainings (default: 60)")
    parser.add_argument("--pretrained", type=int, default=4, help="further ones of the pretrained model (default: 4)")
    seeded.arguments(parser, OUT, PAGE)
    options = parser.parse_args(argv)
    if options.render:
        report = toy.read_report(options.out)
    else:
        counts = options.seeds, options.healthy, options.pretrained
        report = run(options.out, *counts, options.threads, options.go_on, options.quick)
    seeded.place(options.document, "detection", render(report))
    print(f"wrote {options.document}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
