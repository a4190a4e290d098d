"""Faults inside a step and inside the reference store, for children of the fork server and for tests in the process."""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preftune.training.nonfinite_steps import find_row
from tests.faults.worlds import make_trainer

#: A run of few large steps, so that a row holds several pairs.
LARGE_STEPS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 2,
    "disable_dropout": True,
    "optim": "sgd",
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "max_tokens_per_row": None,
}
LACKS: dict[str, BaseException] = {
    "accelerator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "processor": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to get 9 bytes"),
    "python": MemoryError(),
}


def fail_in_backward(trainer: Any, error: BaseException, longer_than: int) -> list[int]:
    """Run out of memory half-way through the backward of rows that are too long, part of the gradient added."""
    met: list[int] = []
    handles: list[Any] = []
    step = trainer.step
    score, true_run = step.score, step.run_rows

    def watched(model: Any, row: Any, with_stats: bool) -> Any:
        scores, output = score(model, row, with_stats)
        if row.num_tokens > longer_than and torch.is_grad_enabled():
            met.append(row.num_tokens)

            def burst(grad: Any) -> None:
                raise error

            # The last layer's gradient is there by then, the first layer's is not.
            handles.append(next(iter(trainer.model.model.layers[0].parameters())).register_hook(burst))
        return scores, output

    def run_rows(*args: Any) -> Any:
        try:
            return true_run(*args)
        finally:
            while handles:
                handles.pop().remove()

    step.score, step.run_rows = watched, run_rows
    return met


def poison(trainer: Any, bad: set[int], where: str) -> None:
    """Make the loss, or its gradient alone, of certain training rows infinite or not a number."""
    true = trainer.row_terms

    def row_terms(row: Any, scores: Any, examples: Any, totals: Any) -> Any:
        terms = true(row, scores, examples, totals)
        for example in examples:
            if find_row(trainer.train_dataset, example) in bad:
                if where == "loss":
                    terms.total = terms.total * float("inf")
                else:
                    total = terms.total
                    total.register_hook(lambda grad: grad * float("nan"))
                    terms.total = total * 1.0
        return terms

    trainer.row_terms = row_terms


def weights(trainer: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


# ---- jobs ----------------------------------------------------------------------------------------------------------


def out_of_memory(world: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Largest difference of any weight's update, relative to the largest update, after steps that were run again."""
    undisturbed = make_trainer(world, out / "a", options["scenario"], **LARGE_STEPS)
    start = weights(undisturbed)
    undisturbed.train()
    trainer = make_trainer(world, out / "b", options["scenario"], **LARGE_STEPS)
    met = fail_in_backward(trainer, LACKS[options["lack"]], longer_than=100)
    trainer.train()
    pairs = list(zip(weights(trainer), weights(undisturbed), start, strict=True))
    difference = max(float((mine - theirs).abs().max()) for mine, theirs, _ in pairs)
    largest = max(float((theirs - before).abs().max()) for _, theirs, before in pairs)
    return {"met": len(met), "difference": difference / largest}


def not_finite(world: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Whether skipped steps left the weights alone and named the row."""
    # Three steps of eight visit all 21 pairs once.
    trainer = make_trainer(world, out, options["scenario"], **LARGE_STEPS | {"max_skipped_steps": 9, "max_steps": 3})
    poison(trainer, {options["row"]}, options["where"])
    seen: list[bool] = []
    true = trainer._get_grad_norm

    def watched(*args: Any, **keywords: Any) -> Any:
        before, step = weights(trainer), trainer.optimizer.step
        skipped = trainer.num_skipped_in_a_row

        def look() -> None:
            step()
            same = all(torch.equal(a, b) for a, b in zip(weights(trainer), before, strict=True))
            seen.append(same == (trainer.num_skipped_in_a_row > skipped))
            trainer.optimizer.step = step

        trainer.optimizer.step = look
        return true(*args, **keywords)

    trainer._get_grad_norm = watched
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    named = [str(w.message) for w in caught if "not finite" in str(w.message)]
    well = all(seen) and len(named) == 1 and f" {options['row']} (" in named[0]
    return {"well": well, "said": named, "looked": len(seen)}


def _entries(writer: int, chunk: int) -> dict[bytes, np.ndarray[Any, Any]]:
    draw = np.random.default_rng([writer, chunk])
    names = [hashlib.blake2b(f"{writer} {chunk} {n}".encode(), digest_size=16).digest() for n in range(64)]
    return {name: draw.standard_normal(50).astype(np.float32) for name in names}


def write_store(world: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Write chunk after chunk into a store, noting each that was committed, in one or two processes."""
    from preftune.references.store import ReferenceStore

    out.mkdir(exist_ok=True)
    other = os.fork() if options.get("writers", 1) == 2 else None
    writer = 1 if other == 0 else 0
    with ReferenceStore(out / "store") as store:
        for chunk in range(options["chunks"]):
            store.put_many("weights", _entries(writer, chunk))
            with open(out / f"committed-{writer}", "a", encoding="ascii") as file:
                file.write(f"{chunk}\n")
    if other == 0:
        os._exit(0)
    if other:
        os.waitpid(other, 0)
    return {}


def read_store(world: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Whether all that was committed is there, to the bit, and nothing else."""
    from preftune.references.store import ReferenceStore

    # A second writer may outlive the one that was killed.
    deadline = time.monotonic() + 20
    missing = checked = 0
    for writer in range(options.get("writers", 1)):
        note = out / f"committed-{writer}"
        while writer and not (note.exists() and len(note.read_text().split()) == options["chunks"]):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        chunks = [int(line) for line in note.read_text().split()] if note.exists() else []
        with ReferenceStore(out / "store") as store:
            for chunk in chunks:
                entries = _entries(writer, chunk)
                found = store.get_many("weights", list(entries))
                checked += len(entries)
                missing += sum(
                    name not in found or not np.array_equal(found[name], value) for name, value in entries.items()
                )
            for chunk in range(options["chunks"]):
                found = store.get_many("weights", list(_entries(writer, chunk)))
                missing += 0 < len(found) < 64
    return {"checked": checked, "missing": missing}


JOBS = {"memory": out_of_memory, "values": not_finite, "write store": write_store, "read store": read_store}
