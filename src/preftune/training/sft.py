"""Supervised fine-tuning on packed rows: a drop-in for TRL's trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed

from preftune.data import PrepareReport, prepare_sft
from preftune.data.prepare import place_of
from preftune.data.sft_tokens import given_mask
from preftune.errors import ConfigError, DataError, ModelError
from preftune.kernels.head import TokenScores
from preftune.packing import Branch, PackedRow, Tree
from preftune.training import checks, setup
from preftune.training.base import PackedTrainer, RowTerms
from preftune.training.batch import Example
from preftune.training.config import SFTConfig
from preftune.training.lengths import ExampleLengths, sequence_lengths
from preftune.training.metrics import Term

_NO_PREFIX = np.zeros(0, dtype=np.int64)


class SFTTrainer(PackedTrainer):
    """Supervised fine-tuning, the stage before preference tuning.

    Takes the arguments of TRL's trainer of the same name, with the same meaning. The loss is the mean over all trained
    tokens of an optimizer step.

    Args:
        model: Name or path, or a model, PEFT-wrapped or not.
        args: Settings; plain ``TrainingArguments`` are completed with the defaults of :class:`SFTConfig`.
        data_collator: Not used: rows are packed, not collated. Passing one is refused.
        train_dataset: Plain text, prompt and completion, or messages.
        eval_dataset: Held-out data, or a mapping of names to such.
        processing_class: Tokenizer; by default the model's own.
        compute_loss_func: Not available, since no logits exist. Passing one is refused.
        compute_metrics: Not available, since no logits exist. Passing one is refused.
        callbacks: Trainer callbacks.
        optimizers: Optimizer and scheduler to use instead of the configured ones.
        optimizer_cls_and_kwargs: Optimizer class and its arguments.
        preprocess_logits_for_metrics: Not available, since no logits exist. Passing one is refused.
        quantization_config: Quantisation for a model given by name.
        peft_config: Adapter to train instead of the whole model.
        formatting_func: Turns a row into the text to train on.
    """

    args: SFTConfig
    example_columns = ("input_ids", "loss_mask")
    denominator = 1
    _tag_names = ("preftune", "sft")
    balances_experts = True

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[Any], str] | None = None,
    ) -> None:
        args = _own_config(args) if args else SFTConfig(setup.default_output_dir(model, "SFT"))
        checks.refuse_collator(data_collator)
        checks.require_dataset(train_dataset)
        for name, given in (
            ("compute_loss_func", compute_loss_func),
            ("compute_metrics", compute_metrics),
            ("preprocess_logits_for_metrics", preprocess_logits_for_metrics),
        ):
            if given is not None:
                raise ConfigError("not available: logits are never built", where=name, remedy=f"leave {name} out")
        set_seed(args.seed)
        model, processing_class = setup.load(model, processing_class, args, quantization_config)
        setup.use_template_and_eos(processing_class, args.chat_template_path, args.eos_token)
        model = setup.wrap_peft(model, peft_config, args)
        self.reports: dict[str, PrepareReport] = {}
        self._data_options = setup.data_options(args)
        self._formatting_func = formatting_func
        if args.packing:
            warnings.warn(
                "packing never mixes examples here, so that a batch still counts examples: with"
                " per_device_train_batch_size as it was, there are more and smaller steps than where examples are"
                " joined",
                UserWarning,
                stacklevel=2,
            )
        streamed = isinstance(train_dataset, datasets.IterableDataset)
        if args.shuffle_dataset and streamed:
            train_dataset = train_dataset.shuffle(seed=args.seed)
        train_dataset = setup.prepared_train(
            train_dataset, args, lambda rows: self._prepared(rows, processing_class, args, "train")
        )
        if args.shuffle_dataset and not streamed:
            # As in TRL, once rows without anything to learn from are gone.
            train_dataset = train_dataset.shuffle(seed=args.seed).flatten_indices()
        if isinstance(eval_dataset, dict):
            eval_dataset = {k: self._prepared(each, processing_class, args, k) for k, each in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._prepared(eval_dataset, processing_class, args, "eval")
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        setup.add_tags(self.model, self._tag_names)

    # ---- data -------------------------------------------------------------------------------------------------------

    def _prepared(self, dataset: Any, tokenizer: Any, args: SFTConfig, name: str) -> Any:
        if isinstance(args.dataset_kwargs, dict) and args.dataset_kwargs.get("skip_prepare_dataset"):
            return self._as_tokenised(dataset, name)
        names = list(getattr(dataset, "column_names", None) or ())
        if self._formatting_func is not None and "input_ids" not in names:
            function = self._formatting_func
            if args.completion_only_loss:
                raise ConfigError(
                    "a formatting function leaves no completion to tell apart",
                    where="completion_only_loss",
                    value=True,
                    remedy="drop formatting_func or completion_only_loss",
                )
            dataset = dataset.map(
                lambda row: {"text": function(row)}, remove_columns=names or list(next(iter(dataset)))
            )
        text_field = "text" if self._formatting_func is not None else args.dataset_text_field
        prepared, self.reports[name] = prepare_sft(
            dataset,
            tokenizer,
            self._data_options,
            completion_only_loss=args.completion_only_loss,
            assistant_only_loss=args.assistant_only_loss,
            dataset_text_field=text_field,
            name=name,
        )
        return prepared

    @staticmethod
    def _as_tokenised(dataset: Any, name: str) -> Any:
        if not isinstance(dataset, datasets.Dataset) or "input_ids" not in dataset.column_names:
            raise ModelError("skip_prepare_dataset needs a dataset with input_ids", where=name)
        if "loss_mask" in dataset.column_names:
            return dataset
        masks = sorted({"assistant_masks", "completion_mask"} & set(dataset.column_names))
        if masks and "labels" not in dataset.column_names:
            raise DataError(
                f"{', '.join(masks)} would not be read with skip_prepare_dataset, and every token be trained on",
                where=name,
                remedy="add a labels column (-100 for what is not trained on), or drop skip_prepare_dataset",
            )
        return dataset.map(lambda row, index: {"loss_mask": given_mask(row, place_of(name, index))}, with_indices=True)

    def evaluation_data(self, dataset: Any, name: str) -> Any:
        """Tokenised examples."""
        return self._prepared(dataset, self.processing_class, self.args, name)

    def example_trees(self, example: Example, number: int) -> tuple[Tree, ...]:
        """One tree with one branch, the whole example."""
        return (Tree(_NO_PREFIX, (Branch(example["input_ids"], 2 * number, example["loss_mask"]),)),)

    def example_totals(self, examples: list[Example]) -> list[float]:
        """Number of examples, and of trained tokens.

        For classes that are not called ``...ForCausalLM``, as GPT-2's, transformers counts a sequence's first token,
        although nothing predicts it, and the loss of TRL's run is divided by that.
        """
        first = 1 if getattr(self, "_loss_shifts_labels", True) else 0
        return [float(len(examples)), float(sum(int(e["loss_mask"][first:].sum()) for e in examples))]

    def example_lengths(self, dataset: Any) -> ExampleLengths | None:
        """Token counts of tokenised examples."""
        return sequence_lengths(dataset)

    def num_tokens(self, examples: list[Example]) -> int:
        """Tokens of all examples."""
        return sum(len(e["input_ids"]) for e in examples)

    # ---- loss -------------------------------------------------------------------------------------------------------

    def row_terms(self, row: PackedRow, scores: TokenScores, examples: list[Example], totals: list[float]) -> RowTerms:
        """Negative log-likelihood over the step's trained tokens."""
        losses = -scores.logps
        if self.args.loss_type == "dft":
            losses = losses * scores.logps.detach().exp()
        metrics: dict[str, Term] = {}
        number = float(len(row.target_ids))
        if scores.entropy is not None and scores.top1 is not None:
            metrics["entropy"] = (scores.entropy.sum(), number)
            metrics["mean_token_accuracy"] = (scores.top1.sum(), number)
        return RowTerms(losses.sum(), number, metrics)


def _own_config(args: SFTConfig | TrainingArguments) -> SFTConfig:
    """The settings themselves, or those of a plain trainer with everything of ours at its default."""
    if isinstance(args, SFTConfig):
        return args
    # What ``to_dict`` gives is for showing: a token in it is masked.
    return SFTConfig(**{**args.to_dict(), "hub_token": args.hub_token})


__all__ = ["SFTTrainer"]
