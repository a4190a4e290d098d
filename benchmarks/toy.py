"""The demo's review world as a test bench: one SFT model and one set of pairs per seed, shared by whatever is compared.

Everything runs on the processor, on one thread by default.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from preftune.demo.training import DemoSettings
from preftune.errors import ConfigError, DataError

RESULTS = Path(__file__).resolve().parent / "results" / "toy"
DOCS = Path(__file__).resolve().parents[1] / "docs"
# What all trainings share beside the sizes of `settings`; as in the demo.
COMMON: dict[str, Any] = {
    "bf16": False,
    "use_cpu": True,
    "max_length": 256,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "logging_steps": 20,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
_Z95 = 1.959963984540054
_SCORES = ("reward", "kl", "accuracy", "rise")


def default_settings() -> DemoSettings:
    """The demo's quick sizes, evaluated on half as many prompts again."""
    return replace(DemoSettings().quick(), num_eval_prompts=300)


def tiny_settings() -> DemoSettings:
    """Sizes that show within seconds that everything works, and nothing else."""
    return replace(
        default_settings(),
        num_reviews=1200,
        num_prompts=96,
        dpo_epochs=1,
        num_eval_prompts=48,
        hidden_size=64,
        num_layers=1,
        samples_per_prompt=1,
    )


@dataclass(frozen=True)
class Bench:
    """What all methods of one seed start from.

    Attributes:
        seed: Of data, weights and samples.
        settings: Sizes and rates.
        world: The ground truth.
        tokenizer: Of all models.
        reference: The SFT model.
        pairs: To train on, labels as the ground truth has them.
        heldout: To measure accuracy on.
        prompts: Fresh ones to sample on.
        before: Scores of the reference.
    """

    seed: int
    settings: DemoSettings
    world: Any
    tokenizer: Any
    reference: Any
    pairs: list[Any]
    heldout: list[Any]
    prompts: list[str]
    before: Any

    def score(self, policy: Any) -> Any:
        """Scores on the fresh prompts; every policy gets the same randomness."""
        return _score(
            policy, self.reference, self.tokenizer, self.world, self.prompts, self.heldout, self.seed, self.settings
        )


def make_bench(seed: int, settings: DemoSettings, folder: Path) -> Bench:
    """Makes corpus, tokenizer, SFT model, pairs and the reference's scores, all from one seed."""
    from preftune.demo import models, pairs, training
    from preftune.demo.world import World

    world = World(seed)
    corpus = world.corpus(settings.num_reviews)
    tokenizer = models.build_tokenizer(corpus)
    start = models.build_model(tokenizer, seed, settings.hidden_size, settings.num_layers)
    reference = training.train_sft(start, tokenizer, corpus, settings, seed, folder / "sft")
    prompts = world.prompts(settings.num_eval_prompts, "heldout")
    train = pairs.make_pairs(reference, tokenizer, world, settings.num_prompts, seed)
    heldout = pairs.make_pairs(reference, tokenizer, world, len(prompts), seed + 1, split="heldout")
    before = _score(reference, reference, tokenizer, world, prompts, heldout, seed, settings)
    return Bench(seed, settings, world, tokenizer, reference, train, heldout, prompts, before)


def _score(
    policy: Any,
    reference: Any,
    tokenizer: Any,
    world: Any,
    prompts: list[str],
    heldout: list[Any],
    seed: int,
    settings: DemoSettings,
) -> Any:
    from preftune.demo.scores import evaluate_policy

    return evaluate_policy(
        policy,
        reference,
        tokenizer,
        world,
        prompts,
        seed + 2,
        pairs=heldout,
        samples_per_prompt=settings.samples_per_prompt,
    )


def train(bench: Bench, trainer: str, rows: Sequence[dict[str, Any]], fields: dict[str, Any], folder: Path) -> Any:
    """Trains a copy of the reference.

    Args:
        bench: Gives reference, tokenizer and rates.
        trainer: "DPO", "KTO", "CPO" or "ORPO".
        rows: The data, in the columns that the trainer reads.
        fields: Of the trainer's configuration; they win over the shared ones.
        folder: The trainer's.

    Returns:
        The trained policy.
    """
    from datasets import Dataset
    from transformers import PrinterCallback

    import preftune
    from preftune.demo.training import clone, quiet

    settings = bench.settings
    folder.mkdir(parents=True, exist_ok=True)
    shared = {
        "num_train_epochs": settings.dpo_epochs,
        "per_device_train_batch_size": settings.dpo_batch_size,
        "learning_rate": settings.dpo_learning_rate,
        "seed": bench.seed,
        # A folder of its own: what an earlier training left would be set aside, with a word.
        "output_dir": tempfile.mkdtemp(dir=folder),
    }
    # The reference-free trainers have no second model to take.
    models = {"ref_model": clone(bench.reference)} if trainer in ("DPO", "KTO") else {}
    with quiet():
        made = getattr(preftune, f"{trainer}Trainer")(
            model=clone(bench.reference),
            args=getattr(preftune, f"{trainer}Config")(**{**COMMON, **shared, **fields}),
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=bench.tokenizer,
            **models,
        )
        made.remove_callback(PrinterCallback)
        made.train()
    return clone(made.model)


def scores_record(scored: Any, before: Any, seed: int) -> dict[str, Any]:
    """Scores for JSON, each with its interval and standard error; ``rise`` is prompt by prompt against `before`."""
    from preftune.stats.intervals import paired_difference

    groups = [sample.prompt_index for sample in scored.samples]
    intervals = {
        "reward": scored.reward,
        "kl": scored.kl,
        "accuracy": scored.accuracy,
        "rise": paired_difference(before.rewards, scored.rewards, groups=groups, seed=seed),
    }
    found: dict[str, Any] = {
        name: {**interval.as_dict(), "standard_error": interval.standard_error} for name, interval in intervals.items()
    }
    return {**found, "length": scored.length, "grammatical": scored.grammatical}


def pooled(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of one record per seed.

    One record keeps its bootstrap interval; of several, the standard errors are added in quadrature (normal interval),
    since every seed has prompts, samples and models of its own.
    """
    found: dict[str, Any] = {"seeds": len(records)}
    for name in _SCORES:
        parts = [record[name] for record in records]
        if len(parts) == 1:
            found[name] = dict(parts[0])
            continue
        mean = math.fsum(part["mean"] for part in parts) / len(parts)
        error = math.sqrt(math.fsum(part["standard_error"] ** 2 for part in parts)) / len(parts)
        found[name] = {
            "mean": mean,
            "low": mean - _Z95 * error,
            "high": mean + _Z95 * error,
            "standard_error": error,
        }
    for name in ("length", "grammatical"):
        found[name] = math.fsum(record[name] for record in records) / len(records)
    return found


def risen(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether the reward rose beyond its interval: its low end after lies above its high end before."""
    return bool(after["reward"]["low"] > before["reward"]["high"])


# ---- result files ---------------------------------------------------------------------------------------------------


def new_report(settings: DemoSettings, threads: int) -> dict[str, Any]:
    """A report without results: sizes, shared fields, environment."""
    from benchmarks.cell import machine

    return {
        "settings": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(settings).items()},
        "common": COMMON,
        "machine": machine({"threads": threads}),
        "references": {},
        "cells": [],
    }


def read_report(path: Path) -> dict[str, Any]:
    """A result file, or a clear error where there is none."""
    if not path.is_file():
        raise DataError("there are no results to render", where=str(path), remedy="run the benchmark without --render")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def enter_reference(report: dict[str, Any], bench: Bench) -> None:
    """Enters the reference's scores of a seed; cells of that seed from another reference are dropped."""
    record = scores_record(bench.before, bench.before, bench.seed)
    record["num_pairs"], record["num_prompts"] = len(bench.pairs), len(bench.prompts)
    if report["references"].get(str(bench.seed)) != record:
        report["cells"] = [cell for cell in report["cells"] if cell["seed"] != bench.seed]
    report["references"][str(bench.seed)] = record


@contextmanager
def workplace() -> Iterator[Path]:
    """A temporary folder for trainers and reference log-probs; methods of one seed share the latter."""
    before = os.environ.get("PREFTUNE_CACHE")
    with tempfile.TemporaryDirectory(prefix="preftune-toy-") as folder:
        os.environ["PREFTUNE_CACHE"] = str(Path(folder) / "references")
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["PREFTUNE_CACHE"]
            else:
                os.environ["PREFTUNE_CACHE"] = before


class Clock:
    """Prints a line per step with the time it took."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def say(self, text: str) -> float:
        """Prints, and returns the seconds since the last line."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        print(f"[{seconds:5.1f} s] {text}", flush=True)
        return round(seconds, 2)


def seeds_of(values: Sequence[int]) -> list[int]:
    """Seeds in order, each once."""
    bad = [value for value in values if not 0 <= value < 2**32 - 1]
    if bad:
        raise ConfigError("not a seed", where="--seeds", value=bad[0], allowed="0 or more, below 2^32 - 1")
    return sorted(set(values))


# ---- text -----------------------------------------------------------------------------------------------------------


def with_interval(part: dict[str, float], digits: int = 3) -> str:
    """``mean [low, high]``."""
    return f"{part['mean']:.{digits}f} [{part['low']:.{digits}f}, {part['high']:.{digits}f}]"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A Markdown table; bars within cells are escaped."""
    lines = ["| " + " | ".join(headers) + " |"]
    lines.append("|" + "|".join("---:" if index in right else "---" for index in range(len(headers))) + "|")
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def conditions(report: dict[str, Any]) -> str:
    """Sizes, rates and environment of a report."""
    from benchmarks.render import machine_text

    s = report["settings"]
    first = next(iter(report["references"].values()))
    return (
        f"**World.** The demo's reviews (`preftune demo`): a Llama of {s['num_layers']} layers and width "
        f"{s['hidden_size']}, fine-tuned on {s['num_reviews']:,} generated reviews, samples two completions for each "
        f"of {s['num_prompts']:,} prompts; the known reward (0 to 1) says which is chosen. The reward after training "
        f"is that of {s['samples_per_prompt']} samples on each of {first['num_prompts']:,} fresh prompts. KL is "
        "KL(policy || reference) in nats per review, on the policy's own samples.\n\n"
        f"**Shared settings.** {s['dpo_epochs']:g} epochs, {s['dpo_batch_size']} pairs a step, peak learning rate "
        f"{s['dpo_learning_rate']:g} (cosine, {report['common']['warmup_steps']} steps of warm-up), AdamW, fp32, "
        "unless a row says otherwise. Published learning rates are for models of billions of parameters.\n\n"
        f"**Environment.** {machine_text(report['machine'])}"
    )
