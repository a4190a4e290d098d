"""Healthy trainings and faults that guards are tried on, in the demo's world; see `benchmarks.detection`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import toy
from preftune.demo.training import DemoSettings

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


def marked(rows: list[Row]) -> list[Row]:
    """Every chosen answer begins with the same sentence, which is all that a policy has to learn."""
    return [{**row, "chosen": f" I would buy it again.{row['chosen']}"} for row in rows]


def one_answer(rows: list[Row]) -> list[Row]:
    """The same answer is the chosen one everywhere."""
    return [{**row, "chosen": " The lid is very sturdy. I would buy it again."} for row in rows]


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
