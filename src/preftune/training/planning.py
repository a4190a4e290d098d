"""Working out the :class:`~preftune.training.plan.TrainingPlan` of a run."""

from __future__ import annotations

import math

from preftune.kernels.device import free_bytes
from preftune.kernels.head import working_bytes
from preftune.models.head import base_model
from preftune.training import memory
from preftune.training.config import PackedConfig
from preftune.training.plan import TrainingPlan
from preftune.training.reference import Reference
from preftune.training.run import Run


def describe(run: Run) -> TrainingPlan:
    """What a run is going to do, from its data, model and settings."""
    args, lengths, model, step = run.args, run.lengths, run.model, run.step
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    num = 0 if lengths is None else len(lengths.row)
    reference = run.task.reference
    row = 0
    if lengths is not None:
        # A row holds examples of one step of one process.
        in_step = math.ceil(lengths.row.sum() * min(1.0, per_step / args.world_size / max(num, 1)))
        row = max(lengths.longest_row, min(step.max_tokens_per_row, in_step))
    return TrainingPlan(
        method=" + ".join(run.task.methods),
        model=str(base_model(model).config._name_or_path or type(base_model(model)).__name__),
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        num_pairs=num,
        pairs_per_step=per_step,
        num_steps=_num_steps(args, num),
        num_prompt_tokens=0 if lengths is None else int(lengths.prompt.sum()),
        num_completion_tokens=0 if lengths is None else int(lengths.completion.sum()),
        num_packed_tokens=0 if lengths is None else int(lengths.row.sum()),
        num_padded_tokens=0 if lengths is None else lengths.padded_tokens(args.train_batch_size),
        max_tokens_per_row=step.max_tokens_per_row,
        path="packed" if step.verdict.ok else "padded",
        backend=_backend(run),
        backend_reason=step.verdict.reason,
        reference=_reference(reference),
        memory=memory.estimate(
            model,
            per_token=step.bytes_per_token,
            row_tokens=min(row, max(step.checkpoint_above, 1)) if args.gradient_checkpointing else row,
            head_bytes=_head_bytes(run, row),
            reference_bytes=_reference_bytes(reference),
            device=args.device,
        ),
        data=dict(run.reports),
    )


def _num_steps(args: PackedConfig, num: int) -> int:
    if args.max_steps > 0:
        return int(args.max_steps)
    batches = math.ceil(num / (args.train_batch_size * args.world_size))
    steps: int = math.ceil(args.num_train_epochs * max(math.ceil(batches / args.gradient_accumulation_steps), 1))
    return steps


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


def _head_bytes(run: Run, row_tokens: int) -> int:
    """Memory for scoring the completions of the longest row."""
    lengths = run.lengths
    weight = getattr(base_model(run.model).get_output_embeddings(), "weight", None)
    if weight is None:
        return 0
    share = 1.0 if lengths is None else float(lengths.completion.sum()) / max(float(lengths.row.sum()), 1.0)
    itemsize = 2 if run.args.bf16 or run.args.fp16 else weight.element_size()
    trained = weight.numel() if weight.requires_grad else 0
    device = run.args.device
    scored = round(min(share, 1.0) * row_tokens)
    return working_bytes(scored, weight.shape[0], itemsize, trained, device, free_bytes(device))
