"""Supervised fine-tuning: whole texts, or the parts of them that are trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np

from preftune.data import PrepareReport, prepare_sft
from preftune.data.sft_tokens import given_mask
from preftune.data.worker import place_of
from preftune.errors import ConfigError, DataError, ModelError
from preftune.kernels.head import TokenScores
from preftune.packing import Branch, PackedRow, Tree
from preftune.training import setup
from preftune.training.batch import Example, Examples, Totals
from preftune.training.lengths import ExampleLengths, sequence_lengths
from preftune.training.metrics import Term
from preftune.training.sft_config import SFTConfig
from preftune.training.task import RowTerms, Task

_NO_PREFIX = np.zeros(0, dtype=np.int64)


class TextTask(Task):
    """Texts; the loss is the mean over all trained tokens of an optimizer step.

    Args:
        args: Settings.
        formatting_func: Turns a row into the text to train on.
    """

    name = "sft"
    config_class = SFTConfig
    trains_on = "completions"
    columns = ("input_ids", "loss_mask")
    denominator = 1
    balances_experts = True

    def __init__(self, args: SFTConfig, formatting_func: Callable[[Any], str] | None = None) -> None:
        super().__init__(args)
        self._args = args
        self._formatting_func = formatting_func

    @property
    def methods(self) -> tuple[str, ...]:
        """Name of the loss."""
        return (self._args.loss_type,)

    # ---- data -------------------------------------------------------------------------------------------------------

    def prepare_model(self, model: Any, tokenizer: Any) -> None:
        """Give the tokenizer the template and the end of text that the settings name."""
        setup.use_template_and_eos(tokenizer, self._args.chat_template_path, self._args.eos_token)
        if self._args.chat_template_path is not None:
            setup.make_room(model, tokenizer)
        if self._args.eos_token is not None or self._args.chat_template_path is not None:
            setup.align_tokens(model, tokenizer)

    def prepare(self, dataset: Any, tokenizer: Any, name: str) -> tuple[Any, PrepareReport | None]:
        """Tokenised texts, with a mask of what is trained on."""
        args, function = self._args, self._formatting_func
        if isinstance(args.dataset_kwargs, dict) and args.dataset_kwargs.get("skip_prepare_dataset"):
            return _as_tokenised(dataset, name), None
        names = list(getattr(dataset, "column_names", None) or ())
        if function is not None and "input_ids" not in names:
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
        return prepare_sft(
            dataset,
            tokenizer,
            self.options,
            completion_only_loss=args.completion_only_loss,
            assistant_only_loss=args.assistant_only_loss,
            dataset_text_field="text" if function is not None else args.dataset_text_field,
            name=name,
        )

    def lengths(self, dataset: Any) -> ExampleLengths | None:
        """Token counts of tokenised examples."""
        return sequence_lengths(dataset)

    def num_tokens(self, examples: Examples) -> int:
        """Tokens of all examples."""
        return sum(len(e["input_ids"]) for e in examples)

    # ---- rows -------------------------------------------------------------------------------------------------------

    def trees(self, example: Example, number: int) -> tuple[Tree, ...]:
        """One tree with one branch, the whole example."""
        return (Tree(_NO_PREFIX, (Branch(example["input_ids"], 2 * number, example["loss_mask"]),)),)

    def totals(self, examples: Examples) -> list[float]:
        """Number of examples, and of trained tokens.

        For classes that are not called ``...ForCausalLM``, as GPT-2's, transformers counts a sequence's first token,
        although nothing predicts it, and the loss of TRL's run is divided by that.
        """
        first = 1 if self.shifts_labels else 0
        return [float(len(examples)), float(sum(int(e["loss_mask"][first:].sum()) for e in examples))]

    def row_terms(self, row: PackedRow, scores: TokenScores, examples: Examples, totals: Totals) -> RowTerms:
        """Negative log-likelihood over the step's trained tokens."""
        losses = -scores.logps
        if self._args.loss_type == "dft":
            losses = losses * scores.logps.detach().exp()
        metrics: dict[str, Term] = {}
        number = float(len(row.target_ids))
        if scores.entropy is not None and scores.top1 is not None:
            metrics["entropy"] = (scores.entropy.sum(), number)
            metrics["mean_token_accuracy"] = (scores.top1.sum(), number)
        return RowTerms(losses.sum(), number, metrics)


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
