"""A run in two lines for those who train from Python: what is trained when it begins, what guards saw when it ends."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from preftune.references.parts import num_elements
from preftune.training.guards import find_guards
from preftune.training.run import Run


class Telling(TrainerCallback):
    """Prints a line when training begins, and what the guards have to say when it ends; ``disable_tqdm`` silences it.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what is trained."""
        if state.is_world_process_zero and not args.disable_tqdm:
            print(summary_line(self._run, state.max_steps), flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say which guards went off."""
        guards = find_guards(self._run)
        if guards is not None and state.is_world_process_zero and not args.disable_tqdm:
            print("\n".join(["guards", *(f"  {line}" for line in guards.summary())]), flush=True)


def summary_line(run: Run, num_steps: int) -> str:
    """What is trained, on what, in how many steps, and how.

    Args:
        run: The run.
        num_steps: Optimizer steps.
    """
    args, lengths = run.args, run.lengths
    sizes = [(num_elements(p), p.requires_grad) for p in run.model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    number = "" if lengths is None else f"{len(lengths.row):,} examples, "
    reference = run.task.reference
    parts = [
        f"preftune {run.task.name} ({' + '.join(run.task.methods)}): {total / 1e6:,.1f} M parameters",
        f"{100 * trained / max(total, 1):.1f} % of them trained",
        f"{number}{num_steps:,} steps of {per_step:,}",
        "packed" if run.step.verdict.ok else f"padded ({run.step.verdict.reason})",
    ]
    return ", ".join(parts) + (f"; reference: {reference.description}" if reference is not None else "")
