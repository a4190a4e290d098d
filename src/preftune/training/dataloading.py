"""How data reach a trainer: preparation, order, shares of processes, whole optimizer steps, and workers that die."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import datasets
import numpy as np
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler
from transformers.trainer_utils import seed_worker

from preftune.data import DataOptions, PrepareReport
from preftune.data.arrow import with_class_names
from preftune.data.loader import load_report
from preftune.data.script_words import told_in_python
from preftune.errors import DataError, TrainingError
from preftune.training import zero
from preftune.training.balancing import Shares, share_of
from preftune.training.batch import Batch, collate
from preftune.training.config import PackedConfig
from preftune.training.lengths import ExampleLengths
from preftune.training.setup import prepared_train
from preftune.training.step import Step
from preftune.training.streams import Stream, is_read_late, read_late
from preftune.training.task import Task
from preftune.training.workers import limited, worker_errors
from preftune.training.zero_config import is_zero3

logger = logging.getLogger(__name__)


class TaskFeeding(Trainer):
    """The part of a trainer that prepares a task's data and reads them, never padded.

    Data-loader workers that hang or die are told as a ``SetupError``.
    """

    args: PackedConfig
    task: Task
    eval_dataset: Any
    #: What became of the rows of each data set.
    reports: dict[str, PrepareReport]
    step: Step
    lengths: ExampleLengths | None

    # ---- preparing --------------------------------------------------------------------------------------------------

    @property
    def _data_options(self) -> DataOptions:
        return self.task.options

    def _prepared(self, dataset: Any, tokenizer: Any, name: str) -> Any:
        try:
            prepared, report = self.task.prepare(dataset, tokenizer, name)
        except DataError as error:
            # What the command line loads is renamed by settings, what a script hands over by the script.
            if load_report(dataset) is not None:
                raise
            raise told_in_python(error) from error
        if report is not None:
            self.reports[name] = report
        return prepared

    def _prepared_train(self, dataset: Any, tokenizer: Any, args: PackedConfig) -> Any:
        def prepare(rows: Any) -> Any:
            return self._prepared(rows, tokenizer, "train")

        if is_read_late(dataset, args, self.task):
            return read_late(with_class_names(dataset), args, self.task, prepare)
        return prepared_train(dataset, args, prepare)

    def _evaluated(self) -> dict[str, Any]:
        """Evaluation data by name."""
        named = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        return {name: each for name, each in named.items() if each is not None}

    # ---- reading ----------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(self.task.columns)  # type: ignore[assignment]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Transformers' sampler, told the lengths where it goes by them: prepared data have no column of them."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            lengths = self.task.lengths(dataset)
            if lengths is not None:
                dataset = datasets.Dataset.from_dict({self.args.length_column_name: lengths.row})
        sampler: Any = super()._get_train_sampler(dataset)
        # Examples are grouped as for one process; a step is divided afterwards.
        if isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size *= self.args.world_size
        elif isinstance(sampler, BatchRebalanceSampler):
            sampler.dp_size, sampler.rank = 1, 0
        return sampler

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of this process's share of the training data, with what the reference makes of them."""
        if not (self.is_in_train or self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # A loop of the caller's own.
            self.keep_beginning()
        args = self.args
        accelerator, dataset = self.accelerator, self.train_dataset
        if isinstance(dataset, Stream):
            # Every process reads all of it, and takes its share of each step.
            size = args.train_batch_size * args.world_size
            return self._as_for_one_process(dataset, batch_size=size, drop_last=args.dataloader_drop_last)
        if args.world_size == 1 or not isinstance(dataset, datasets.Dataset):
            return limited(super().get_train_dataloader(), args.worker_timeout)
        sampler = self._get_train_sampler()
        batches = sampler
        if not isinstance(sampler, BatchRebalanceSampler):
            batches = BatchSampler(sampler, args.train_batch_size * args.world_size, args.dataloader_drop_last)
        seedable = accelerator.use_seedable_sampler and isinstance(sampler, RandomSampler)
        drawn_here = hasattr(sampler, "generator") and not seedable
        shares = Shares(
            batches,
            self._costs(dataset),
            share=(args.process_index, args.world_size),
            per_step=args.gradient_accumulation_steps,
            group=args.train_batch_size if self.step.router else None,
            agree=self.step.processes.firsts if drawn_here else None,
        )
        return self._as_for_one_process(
            self._remove_unused_columns(dataset, description="training"), batch_sampler=shares
        )

    def _as_for_one_process(self, dataset: Any, **batches: Any) -> DataLoader[Any]:
        """A loader that accelerate does not divide once more."""
        args, accelerator = self.args, self.accelerator
        begin = partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index)
        loader: Any = DataLoader(
            dataset,
            **batches,
            collate_fn=collate,
            # Several workers would each read all of a stream.
            num_workers=min(args.dataloader_num_workers, 1 if isinstance(dataset, Stream) else 1 << 30),
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
            worker_init_fn=begin,
        )
        loader = prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=1,
            process_index=0,
            dispatch_batches=False,
            rng_types=[],
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
            use_stateful_dataloader=accelerator.use_stateful_dataloader,
        )
        return limited(loader, args.worker_timeout)

    def keep_beginning(self) -> None:
        """Know what is compared with, before the policy moves."""
        raise NotImplementedError

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Wrap the model; then, where it is sharded, know the reference before a checkpoint moves the policy."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return super()._prepare_for_training(  # type: ignore[no-untyped-call]
                max_steps, train_dataloader, resume_from_checkpoint
            )
        if is_zero3(self.args):
            zero.shard(self, max_steps)
        model, _ = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[no-untyped-call]
        if is_zero3(self.args):
            zero.attend_to(model)
        self.keep_beginning()
        train_dataloader = self.callback_handler.train_dataloader = self.get_train_dataloader()
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return model, train_dataloader

    def _costs(self, dataset: Any) -> list[int]:
        """Tokens of every example, all alike where they are unknown."""
        lengths = self.lengths if dataset is self.train_dataset else self.task.lengths(dataset)
        counts = np.ones(len(dataset), dtype=np.int64) if lengths is None else lengths.row
        found: list[int] = counts.tolist()
        return found

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Batches of this process's share of the evaluation data, every example exactly once over all processes."""
        args = self.args
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("Trainer: evaluation requires an eval_dataset.")
        more: dict[str, Any] = {"batch_size": args.eval_batch_size}
        if args.world_size > 1:
            if not isinstance(dataset, datasets.Dataset):
                raise TrainingError("this dataset cannot be split over processes", value=type(dataset).__name__)
            batches = BatchSampler(SequentialSampler(dataset), args.eval_batch_size * args.world_size, False)
            more = {
                "batch_sampler": Shares(
                    batches,
                    self._costs(dataset),
                    share=(args.process_index, args.world_size),
                    group=args.eval_batch_size if self.step.router else None,
                    keep_empty=False,
                )
            }
        if hasattr(dataset, "column_names") and hasattr(dataset, "remove_columns"):
            dataset = self._remove_unused_columns(dataset, description="evaluation")
        loader: DataLoader[Any] = DataLoader(
            dataset,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            **more,
        )
        return limited(loader, args.worker_timeout)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Batches of data to predict on, shared out as for evaluation."""
        return self.get_eval_dataloader(test_dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: Any
    ) -> tuple[list[Any], None]:
        """All micro-batches of an optimizer step as one, preceded by empty ones to keep transformers' step count."""
        batches = list(islice(epoch_iterator, num_batches))
        if self.args.world_size > 1 and isinstance(self.train_dataset, Stream):
            batches = self._own_share(batches)
        return [*(Batch() for _ in batches[1:]), Batch.merged(batches)] if batches else [], None

    def _own_share(self, batches: list[Batch]) -> list[Batch]:
        """This process's share of a step that all have read."""
        examples = Batch.merged(batches).examples
        numbers = iter(range(len(examples)))
        step = [list(islice(numbers, len(batch))) for batch in batches]
        costs = self.step.lengths_of(examples)
        share = self.args.process_index, self.args.world_size
        mine = share_of(step, costs, share, self.args.train_batch_size if self.step.router else None)
        return [Batch([examples[number] for number in each], [len(each)]) for each in mine]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see transformers' ``Trainer.train``."""
        with worker_errors(self.args):
            return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; see transformers' ``Trainer.evaluate``."""
        with worker_errors(self.args):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict; see transformers' ``Trainer.predict``. There are no logits: predictions are rewards, or ``None``."""
        with worker_errors(self.args):
            found: Any = super().predict(*args, **kwargs)
        if found.predictions is None:
            # Rewards are kept only for the user's compute_metrics.
            logger.warning("predict returns metrics and no predictions: logits are never built")
        return found
