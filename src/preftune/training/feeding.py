"""How examples reach a trainer: order, shares of processes, whole optimizer steps, and workers that hang or die."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import datasets
from torch.utils.data import DataLoader

from preftune.errors import TrainingError
from preftune.training.batch import Batch, collate
from preftune.training.checkpoints import CheckpointedTrainer
from preftune.training.config import PackedConfig
from preftune.training.lengths import ExampleLengths
from preftune.training.workers import limit_collectives, limited, worker_errors

logger = logging.getLogger(__name__)


class FedTrainer(CheckpointedTrainer):
    """Reads tokenised examples, never padded."""

    args: PackedConfig
    eval_dataset: Any
    #: Columns that the data loader hands on.
    example_columns: tuple[str, ...] = ()

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("data_collator", collate)
        super().__init__(**kwargs)
        limit_collectives(self.args)

    def example_lengths(self, dataset: Any) -> ExampleLengths | None:
        """Token counts of prepared data; ``None`` where they are unknown."""
        raise NotImplementedError

    # ---- order and shares -------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(self.example_columns)  # type: ignore[assignment]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Transformers' sampler, told the lengths where it goes by them: prepared data have no column of them."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            lengths = self.example_lengths(dataset)
            if lengths is not None:
                dataset = datasets.Dataset.from_dict({self.args.length_column_name: lengths.row})
        return super()._get_train_sampler(dataset)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of this process's share of the training data."""
        return limited(super().get_train_dataloader(), self.args.worker_timeout)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Batches of this process's share of the evaluation data, every example exactly once over all processes."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("Trainer: evaluation requires an eval_dataset.")
        return self._plain_loader(dataset, self.args.eval_batch_size)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Batches of data to predict on, shared out as for evaluation."""
        return self.get_eval_dataloader(test_dataset)

    def _plain_loader(self, dataset: Any, batch_size: int) -> DataLoader[Any]:
        if hasattr(dataset, "column_names") and hasattr(dataset, "remove_columns"):
            dataset = self._remove_unused_columns(dataset, description="evaluation")
        world, rank = self.args.world_size, self.args.process_index
        if world > 1:
            if not hasattr(dataset, "shard"):
                raise TrainingError("this dataset cannot be split over processes", value=type(dataset).__name__)
            dataset = dataset.shard(world, rank, contiguous=False)
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=batch_size,
            collate_fn=collate,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )
        return limited(loader, self.args.worker_timeout)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: Any
    ) -> tuple[list[Any], None]:
        """All micro-batches of an optimizer step as one, preceded by empty ones to keep transformers' step count."""
        batches = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch)
        if not batches:
            return [], None
        return [*(Batch() for _ in batches[1:]), Batch.merged(batches)], None

    # ---- workers ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; see transformers' ``Trainer.train``.

        Raises:
            SetupError: A data-loader worker hangs or has died.
        """
        with worker_errors(self.args):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; see transformers' ``Trainer.evaluate``.

        Raises:
            SetupError: A data-loader worker hangs or has died.
        """
        with worker_errors(self.args):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict; see transformers' ``Trainer.predict``. There are no logits: predictions are rewards, or ``None``.

        Raises:
            SetupError: A data-loader worker hangs or has died.
        """
        with worker_errors(self.args):
            found: Any = super().predict(*args, **kwargs)
        if found.predictions is None:
            # Rewards are kept for whom they are of use, the user's compute_metrics.
            logger.warning("predict returns metrics and no predictions: logits are never built")
        return found
