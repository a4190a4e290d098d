"""How examples reach a trainer: order, shares of processes, and whole optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import datasets
from torch.utils.data import DataLoader

from preftune.errors import TrainingError
from preftune.training.batch import Batch, collate
from preftune.training.config import PackedConfig
from preftune.training.lengths import ExampleLengths
from preftune.training.workers import limited


def ordered_by(dataset: Any, lengths_of: Callable[[Any], ExampleLengths | None], args: PackedConfig) -> Any:
    """What transformers' sampler orders: where it goes by lengths, of which prepared data have no column, the lengths.

    Args:
        dataset: Prepared data.
        lengths_of: Their token counts.
        args: Settings.
    """
    if args.train_sampling_strategy not in ("group_by_length", "batch_rebalance"):
        return dataset
    lengths = lengths_of(dataset)
    return dataset if lengths is None else datasets.Dataset.from_dict({args.length_column_name: lengths.row})


def evaluation_loader(dataset: Any, args: PackedConfig) -> DataLoader[Any]:
    """Batches of this process's share of evaluation data, every example exactly once over all processes."""
    if args.world_size > 1:
        if not hasattr(dataset, "shard"):
            raise TrainingError("this dataset cannot be split over processes", value=type(dataset).__name__)
        dataset = dataset.shard(args.world_size, args.process_index, contiguous=False)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=args.eval_batch_size,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )
    return limited(loader, args.worker_timeout)


def step_batches(batches: Iterator[Batch], number: int) -> list[Batch]:
    """Micro-batches of an optimizer step as one, preceded by empty ones to keep transformers' step count."""
    found = list(islice(batches, number))
    return [*(Batch() for _ in found[1:]), Batch.merged(found)] if found else []
