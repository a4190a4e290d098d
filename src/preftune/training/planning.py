"""Working out the :class:`~preftune.training.plan.TrainingPlan` of a run."""

from __future__ import annotations

import math
from dataclasses import replace

from preftune.kernels.device import free_bytes
from preftune.models.head import base_model
from preftune.models.shapes import shape_of_model
from preftune.training.estimate import (
    Workload,
    checkpointing_of,
    estimate_memory,
    estimate_time,
    exchanges,
    lengths_of_rows,
    num_steps,
    trains_little,
)
from preftune.training.lengths import Counts, ExampleLengths
from preftune.training.machines import this_machine
from preftune.training.plan import MemoryEstimate, TimeEstimate, TrainingPlan
from preftune.training.reference import Reference
from preftune.training.run import Run


def describe(run: Run) -> TrainingPlan:
    """What a run is going to do, from its data, model and settings."""
    args, lengths, model, step = run.args, run.lengths, run.model, run.step
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    num = 0 if lengths is None else len(lengths.row)
    reference = run.task.reference
    steps = num_steps(
        num,
        args.train_batch_size,
        args.gradient_accumulation_steps,
        args.world_size,
        float(args.num_train_epochs),
        int(args.max_steps),
    )
    memory, time = _estimates(run, steps)
    return TrainingPlan(
        method=" + ".join(run.task.methods),
        model=str(base_model(model).config._name_or_path or type(base_model(model)).__name__),
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        num_pairs=num,
        pairs_per_step=per_step,
        num_steps=steps,
        num_prompt_tokens=0 if lengths is None else int(lengths.prompt.sum()),
        num_completion_tokens=0 if lengths is None else int(lengths.completion.sum()),
        num_packed_tokens=0 if lengths is None else int(lengths.row.sum()),
        num_padded_tokens=0 if lengths is None else lengths.padded_tokens(args.train_batch_size),
        max_tokens_per_row=step.max_tokens_per_row,
        path="packed" if step.verdict.ok else "padded",
        backend=_backend(run),
        backend_reason=step.verdict.reason,
        reference=_reference(reference),
        memory=memory,
        time=time,
        data=dict(run.reports),
    )


def _estimates(run: Run, steps: int) -> tuple[MemoryEstimate, TimeEstimate | None]:
    """Memory and time, by the model of :mod:`preftune.training.estimate`."""
    args, lengths, step, reference = run.args, run.lengths, run.step, run.task.reference
    half = bool(args.bf16 or args.fp16)
    shape = shape_of_model(run.model, half=half, per_token=step.bytes_per_token)
    free = free_bytes(args.device)
    machine = this_machine(processor=args.device.type == "cpu")
    # The weights lie in what was free before.
    machine = replace(machine, memory=(machine.memory if free is None else free) + shape.weight_bytes)
    live = reference is not None and reference.store is None
    copied = live and reference is not None and reference.separate is None and not trains_little(shape)
    work = Workload(
        pairs_per_step=args.train_batch_size * args.gradient_accumulation_steps,
        num_pairs=0 if lengths is None else math.ceil(len(lengths.row) / args.world_size),
        num_steps=steps,
        **({} if lengths is None else lengths_of_rows(*_trained(run, lengths))),
        exchanges=exchanges(run.task.methods),
        max_tokens_per_row=step.max_tokens_per_row,
        half=half,
        optim=str(getattr(args.optim, "value", args.optim)),
        needs_reference=reference is not None,
        live_reference=live,
        separate_reference=_reference_bytes(reference),
        copies=int(copied) + int(args.generation_steps > 0 and not trains_little(shape)),
        checkpointing=checkpointing_of(args),
        offloading=bool(args.activation_offloading),
        sharded=args.world_size if run.step.processes.sharded else 1,
    )
    memory = estimate_memory(shape, work, machine, checkpoint_above=step.checkpoint_above)
    return memory, None if lengths is None else estimate_time(shape, work, machine)


def _trained(run: Run, lengths: ExampleLengths) -> tuple[Counts, Counts]:
    """Prompt and completion tokens of an example's row."""
    prompt = lengths.row - lengths.completion
    if not exchanges(run.task.methods) or lengths.sequences.shape[1] < 2:
        return prompt, lengths.completion
    # The second sequence, the prompt with another's answer, is scored for the baseline and not trained on.
    own = prompt // 2
    return own, lengths.sequences[:, 0] - own


def _backend(run: Run) -> str:
    if not run.step.verdict.ok:
        return "the model's own attention"
    return ", ".join(sorted(run.step.forward.backends_used)) or run.args.attention_backend


def _reference(reference: Reference | None) -> str:
    if reference is None:
        return "none"
    how = "run along" if reference.store is None else f"from the store ({reference.store.file})"
    return f"{reference.description}, {how}"


def _reference_bytes(reference: Reference | None) -> int:
    if reference is None or reference.separate is None:
        return 0
    return sum(p.numel() * p.element_size() for p in reference.separate.model.parameters())
