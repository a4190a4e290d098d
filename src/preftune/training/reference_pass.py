"""The reference of a run: which model it is, and the pass over all data that the run visits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainerCallback

from preftune.models.forward import RowForward
from preftune.references.scoring import STORED_AGREEMENT
from preftune.references.store import ReferenceStore
from preftune.training import fsdp, memory
from preftune.training.engines import shard_as
from preftune.training.given_references import reloaded
from preftune.training.preference_config import ReferenceConfig
from preftune.training.reference import COLUMNS, Reference
from preftune.training.step import Step

#: Difference of policy and reference in nats per token that rounding can explain, by half-precision or not.
_AGREEMENT = {True: 5e-2, False: 2e-3}


def agreement(accelerator: Accelerator, model: nn.Module) -> float:
    """Nats per token that a policy and itself may differ by, computed twice."""
    return _AGREEMENT[_is_half(accelerator, model)]


def _is_half(accelerator: Accelerator, model: nn.Module) -> bool:
    return accelerator.mixed_precision != "no" or next(model.parameters()).dtype != torch.float32


def make_reference(
    step: Step, args: ReferenceConfig, given: Any, forward_of: Callable[[Any], RowForward], *, mapped: bool
) -> Reference:
    """The reference that the settings ask for.

    Args:
        step: The policy, in its initial state.
        args: Settings.
        given: A model that is the reference, or ``None``.
        forward_of: Makes a model ready to score rows.
        mapped: Whether training data are known beforehand.
    """

    def reload() -> RowForward | None:
        model = reloaded(step.forward.model, args)
        return None if model is None else forward_of(model)

    fixed = args.reference_store and not args.sync_ref_model and mapped
    mixed = str(step.accelerator.mixed_precision)
    compute = {"mixed_precision": mixed}
    if mixed != "no" and step.accelerator.distributed_type == DistributedType.DEEPSPEED:
        # Not autocast: the weights themselves are rounded.
        compute["weights"] = mixed
    return Reference(
        step.forward,
        step.accelerator.autocast,
        store=ReferenceStore() if fixed else None,
        model=None if given is None else forward_of(given),
        adapter=args.ref_adapter_name,
        ld_alpha=step.task.ld_alpha,
        compute=compute,
        rounding=lambda: fsdp.rounding(step.forward.model, step.accelerator),
        reload=reload,
        spread=lambda model: shard_as(step.forward.model, model, step.accelerator),
        show_progress=not args.disable_tqdm,
        follows=args.sync_ref_model,
        tolerance=STORED_AGREEMENT[_is_half(step.accelerator, step.forward.model if given is None else given)],
    )


class SyncReference(TrainerCallback):
    """Moves a reference towards the policy every so many steps (TR-DPO, 2404.09656).

    Args:
        reference: The reference.
    """

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    def on_step_end(  # type: ignore[override]
        self, args: ReferenceConfig, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Follow the policy where a synchronisation is due."""
        if state.global_step % args.ref_model_sync_steps == 0:
            self._reference.follow(args.ref_model_mixup_alpha)


def with_reference(step: Step, dataset: Any, name: str, rows: list[int] | None = None) -> Any:
    """Data with what the fixed reference of a run makes of them.

    Args:
        step: The reference's task, token budgets, and the processes that divide what is missing.
        dataset: Tokenised examples; of a stream nothing is known beforehand, and the reference will run along.
        name: Name of the data, for the progress bar.
        rows: Which of them are needed; by default all.
    """
    reference, processes = step.task.reference, step.processes
    assert reference is not None
    if not isinstance(dataset, datasets.Dataset):
        reference.keep_shadow()
        return dataset
    rows = list(range(len(dataset))) if rows is None else rows
    if set(COLUMNS) <= set(dataset.column_names):
        known = np.isfinite(np.asarray(dataset[COLUMNS[0]], dtype=np.float32))
        if known[rows].all():
            return dataset
        dataset = dataset.remove_columns(list(COLUMNS))
    lengths = step.task.lengths(dataset)
    sums = reference.sums(
        dataset,
        rows,
        max_tokens=memory.reference_budget(step.max_tokens_per_row, step.device),
        costs=np.ones(len(dataset), dtype=np.int64) if lengths is None else lengths.row,
        share=(processes.index, processes.number),
        joined=processes.added,
        in_step=processes.most_rows if processes.sharded else None,
        description=f"Reference log-probs ({name})",
    )
    for column, values in zip(COLUMNS, sums.T, strict=True):
        dataset = dataset.add_column(column, values)
    return dataset
