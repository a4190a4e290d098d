"""Which rows of the training data a run is going to visit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from preftune.training.checks import overrides
from preftune.training.config import PackedConfig


class _Indices(Dataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


def sampler_of(trainer: Any) -> Callable[[], Any] | None:
    """What makes a trainer's sampler; ``None`` where a script has a sampler or a loader of its own."""
    own = overrides(trainer, "get_train_dataloader", "_get_train_sampler")
    return None if own else trainer._get_train_sampler


def visited_rows(args: PackedConfig, size: int, sampler: Callable[[], Any] | None) -> list[int]:
    """Rows that any process will train on, ascending.

    Only a run shorter than one epoch leaves rows out. Its data order is that of transformers' sampler, which a loader
    over bare indices with the same sampler repeats; random state is left as it was.

    Args:
        args: Settings of the run.
        size: Rows of the training data.
        sampler: Makes transformers' sampler; ``None`` where nobody foresees the order.
    """
    if sampler is None:
        return list(range(size))
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.train_sampling_strategy == "sequential" and args.max_steps > 0:
        return list(range(min(size, args.max_steps * per_step)))
    seedable = getattr(args.accelerator_config, "use_seedable_sampler", True)
    foreseeable = args.train_sampling_strategy == "random" and seedable
    if args.max_steps <= 0 or args.max_steps * per_step >= size or not foreseeable:
        return list(range(size))
    state = torch.get_rng_state()
    try:
        order = _seeded_order(sampler(), args.data_seed)
        # Processes take turns batch by batch, so that together they consume the order from its beginning.
        return sorted({int(i) for i in itertools.islice(order, args.max_steps * per_step)})
    finally:
        torch.set_rng_state(state)


def _seeded_order(sampler: Any, data_seed: int | None) -> Any:
    from accelerate.data_loader import SeedableRandomSampler

    seedable = SeedableRandomSampler(
        data_source=_Indices(len(sampler.data_source)),
        replacement=sampler.replacement,
        num_samples=sampler._num_samples,
        generator=torch.Generator(),
        data_seed=data_seed,
    )
    return iter(seedable)
