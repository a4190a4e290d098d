"""From rows to tokenised examples for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from preftune.data import batches
from preftune.data.assistant import assistant_masks, has_markers
from preftune.data.batches import Outcome
from preftune.data.environment import has_environment, own_words
from preftune.data.formats import FORMATS, NOT_USED, FormatSpec, Row, detect, resolve
from preftune.data.formats.alpaca import ALPACA
from preftune.data.formats.base import FLOAT_EXTRAS, BadRow, common_prefix
from preftune.data.formats.unpaired import label_column
from preftune.data.options import DataOptions
from preftune.data.report import PrepareReport
from preftune.data.rows import BadRowHandler
from preftune.data.sft_tokens import SFT_COLUMNS, TokenisedSftWorker, enter
from preftune.data.stages import Stages
from preftune.data.tables import from_dataset
from preftune.data.tokenise import sequences
from preftune.data.truncation import Ids
from preftune.data.worker import RowWorker
from preftune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


#: Fields of a turn that say whether it is trained on.
_MARKS = ("weight", "train", "trainable", "training", "loss", "loss_mask")


@dataclass
class Example:
    """One tokenised example before truncation.

    Attributes:
        ids: Token ids.
        mask: 1 for every token that is trained on.
        merged: End of the tokenised prompt that the sequence does not contain.
        doubled_bos: A second beginning-of-sequence token was removed.
    """

    ids: Ids
    mask: list[int]
    merged: Ids
    doubled_bos: bool = False


def _with_chosen(spec: FormatSpec) -> FormatSpec:
    """The format of preference rows, read as examples of the chosen answer."""

    def convert(row: Mapping[str, Any]) -> Row:
        pair = spec.convert({key: value for key, value in row.items() if key not in FLOAT_EXTRAS})
        pair.pop("rejected")
        return {"prompt": pair.pop("prompt"), "completion": pair.pop("chosen"), **pair}

    return replace(spec, kind="sft", convert=convert)


class SftWorker(RowWorker):
    """Rows of one format to tokenised, truncated examples.

    Args:
        tokenizer: Tokenizer of the model.
        options: Data options.
        format_name: Format of the rows.
        name: Name of the data set, for messages.
        text_field: Column of plain text.
        completion_only_loss: Train on completions only; ``None`` does so where rows have one.
        assistant_only_loss: Train on assistant turns only.
    """

    columns = SFT_COLUMNS

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: DataOptions,
        format_name: str,
        name: str,
        *,
        text_field: str = "text",
        completion_only_loss: bool | None = None,
        assistant_only_loss: bool = False,
    ) -> None:
        super().__init__(tokenizer, options, format_name, name)
        self.text_field = text_field
        self.completion_only_loss = completion_only_loss
        self.assistant_only_loss = assistant_only_loss

    @property
    def spec(self) -> FormatSpec:
        """The format of the rows; of pairs, the chosen answers are the completions."""
        spec = FORMATS[self.format]
        return _with_chosen(spec) if spec.kind == "preference" else spec

    def canonical(
        self, raw: Sequence[Any], indices: Sequence[int], handler: BadRowHandler
    ) -> tuple[list[Outcome], list[int], list[Row]]:
        """As for any rows, after the column of text got its name."""
        if self.format == "text" and self.text_field != "text":
            raw = [{**row, "text": row.get(self.text_field)} for row in raw]
        return super().canonical(raw, indices, handler)

    def results(self, rows: Sequence[Row]) -> list[Example | BadRow]:
        """Examples before truncation."""
        return self.examples(rows)

    def examples(self, rows: Sequence[Row]) -> list[Example | BadRow]:
        """Tokenised examples of checked canonical rows, before truncation."""
        out: list[Any] = [None] * len(rows)
        for kind in ("text", "messages", "completion"):
            positions = [i for i, row in enumerate(rows) if kind in row]
            some = [rows[i] for i in positions]
            if not some:
                continue
            results = {"text": self._texts, "messages": self._messages, "completion": self._completions}[kind](some)
            for i, result in zip(positions, results, strict=True):
                out[i] = result
        return out

    def _texts(self, rows: Sequence[Row]) -> list[Example | BadRow]:
        out: list[Example | BadRow] = []
        for ids in self.encoder.encode([self.encoder.with_eos(row["text"]) for row in rows], special=True):
            clean = self.encoder.drop_doubled_bos(ids)
            out.append(Example(clean, [1] * len(clean), [], len(clean) < len(ids)))
        return out

    def _messages(self, rows: Sequence[Row]) -> list[Example | BadRow]:
        conversations = [row["messages"] for row in rows]
        if self.assistant_only_loss:
            masked = assistant_masks(self.encoder, conversations, rows)
            return [one if isinstance(one, BadRow) else Example(one[0], one[1], []) for one in masked]
        encoded = self.encoder.conversations(conversations, rows, generation_prompt=False)
        return [ids if isinstance(ids, BadRow) else Example(ids, [1] * len(ids), []) for ids in encoded]

    def _completions(self, rows: Sequence[Row]) -> list[Example | BadRow]:
        out: list[Example | BadRow] = []
        for row, parts in zip(rows, sequences(self.encoder, rows, ("completion",)), strict=True):
            if isinstance(parts, BadRow):
                out.append(parts)
                continue
            plain = isinstance(row["prompt"], str)
            prompt, ids = (self.encoder.drop_doubled_bos(part) for part in parts) if plain else parts
            start = common_prefix(prompt, ids)
            own: list[int] | BadRow = [1] * (len(ids) - start)
            if self.options.environment_turns == "masked" and has_environment(row["completion"]):
                own = own_words(self.encoder, row, "completion", ids, start)
            if isinstance(own, BadRow):
                out.append(own)
                continue
            mask = [int(self.completion_only_loss is False)] * start + own
            out.append(Example(ids, mask, prompt[start:], plain and len(ids) < len(parts[1])))
        if self.assistant_only_loss:
            whole = [[*row["prompt"], *row["completion"]] for row in rows]
            for i, masked in enumerate(assistant_masks(self.encoder, whole, rows)):
                example = out[i]
                if isinstance(masked, BadRow) or isinstance(example, BadRow):
                    out[i] = masked if isinstance(masked, BadRow) else example
                else:
                    example.mask = [a & b for a, b in zip(example.mask, masked[1], strict=True)]
        return out

    def labels(self, example: Example) -> list[tuple[int, str]]:
        """Every token with ``prompt`` (context), ``trained on`` or ``dropped``, for showing."""
        names = ["trained on" if bit else "prompt" for bit in example.mask]
        names[:1] = ["prompt"]
        excess = max(0, len(names) - (self.options.max_length or len(names)))
        if excess and self.options.truncation_mode == "keep_end":
            names = ["dropped"] * excess + ["prompt"] + names[excess + 1 :]
        elif excess:
            names = names[:-excess] + ["dropped"] * excess
        return list(zip(example.ids, names, strict=True))

    def append_eos(self, row: Row, example: Example) -> tuple[bool, bool]:
        """End a conversation's example with the end-of-sequence token, where the options ask for it.

        Returns:
            Whether the token was missing, and whether it was appended.
        """
        missing = not self.encoder.ends_with_eos(example.ids)
        chat = not isinstance(row.get("text", row.get("prompt")), str)
        appended = missing and chat and self.options.append_eos and self.encoder.tokenizer.eos_token_id is not None
        if appended:
            example.ids = self.encoder.append_eos(example.ids)
            turns: list[Any] = row.get("messages") or row["completion"]
            example.mask = [*example.mask, int(not self.assistant_only_loss or turns[-1].get("role") == "assistant")]
        return missing, appended

    def fill(self, outcome: Outcome, row: Row, result: Example) -> None:
        """Enter an example into its outcome."""
        example = result
        missing, appended = self.append_eos(row, example)
        outcome.flags |= (
            batches.MERGED * bool(example.merged)
            + batches.DOUBLED_BOS * example.doubled_bos
            + batches.EOS_MISSING * missing
            + batches.EOS_APPENDED * appended
            + batches.ENVIRONMENT * has_environment(row.get("completion"))
            + batches.MARKED * _has_marks(row.get("messages") or row.get("completion"))
        )
        enter(outcome, example.ids, example.mask, self.options)


def _has_marks(turns: Any) -> bool:
    """Whether a turn is marked as one not to be trained on, as OpenAI, axolotl and ms-swift do."""
    return isinstance(turns, list) and any(turn.get(name) in (0, False) for turn in turns for name in _MARKS)


def _refuse_prompt_length(options: DataOptions) -> None:
    if options.max_prompt_length is not None:
        raise ConfigError(
            "max_prompt_length is for preference pairs",
            where="max_prompt_length",
            value=options.max_prompt_length,
            remedy="use max_length",
        )


def prepare_sft(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    *,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    dataset_text_field: str = "text",
    name: str = "train",
) -> tuple[Dataset, PrepareReport]:
    """Tokenise, mask and truncate data for supervised fine-tuning.

    Args:
        dataset: Rows of an SFT format, preference rows (their chosen answers are the completions), or token ids.
        tokenizer: Tokenizer of the model, with its chat template where the rows are conversations.
        options: Data options; ``max_prompt_length`` has no meaning here and is refused.
        completion_only_loss: Train on completions only; ``None`` does so where rows have a prompt and a completion.
        assistant_only_loss: Train on assistant turns only; for conversations.
        dataset_text_field: Column of plain text.
        name: Name of the data set, for messages and the report.

    Returns:
        A data set with ``input_ids`` and ``loss_mask`` (1 for every token trained on), and the report. Both are what
        TRL 1.16's ``SFTTrainer`` trains on, without a doubled BOS and examples with no scored token.

    Raises:
        ConfigError: Settings that contradict each other or the data.
        DataError: Bad rows that the policy does not allow, too many lost rows, or no SFT data.
        ModelError: The tokenizer lacks a chat template, an end-of-sequence token, or character offsets.
    """
    _refuse_prompt_length(options)
    stages = Stages.begin(dataset, options, name)
    names = stages.dataset.column_names
    worker: SftWorker | TokenisedSftWorker
    if "input_ids" in names:
        if completion_only_loss is None:
            completion_only_loss = {"prompt", "completion"} <= set(names)
        masks = ("assistant_masks", *(["completion_mask"] if completion_only_loss else []))
        worker = TokenisedSftWorker(options, name, masks)
        if "completion_mask" in names and not completion_only_loss:
            stages.notes.append("completion_mask is not used, as in TRL, unless completion_only_loss is true")
    else:
        spec = sft_format(stages.dataset, options, name, dataset_text_field)
        stages.read_as(spec, for_sft=True)
        worker = SftWorker(
            tokenizer,
            options,
            spec.name,
            name,
            text_field=dataset_text_field,
            completion_only_loss=completion_only_loss,
            assistant_only_loss=assistant_only_loss,
        )
        stages.notes += _setting_notes(spec, worker, names)
        stages.findings += _of_labels(stages)
    result, tally = batches.run(stages.dataset, worker, options, f"Preparing {name}")
    stages.check(tally)
    lengths, num_trained = _lengths(result)
    tokens = (int(lengths.sum()) - num_trained, num_trained, 0)
    return result, stages.report(result, tally, {"sequence": lengths}, tokens)


def _lengths(result: Dataset) -> tuple[Any, int]:
    """Lengths of the sequences, and the number of tokens trained on."""
    import numpy as np
    import pyarrow.compute as pc

    table = result.data.table
    return pc.list_value_length(table["input_ids"]).to_numpy(), int(np.sum(pc.list_flatten(table["loss_mask"])))


def sft_format(dataset: Dataset, options: DataOptions, name: str, text_field: str) -> FormatSpec:
    """The format of rows for supervised fine-tuning.

    Raises:
        DataError: The format is unknown, or does not say which answer to learn.
    """
    columns = list(dataset.column_names)
    example = from_dataset(name, dataset).example()
    if text_field != "text":
        # The named column takes the place of one that happens to be called text.
        columns = [column for column in columns if column != "text"]
        if text_field in columns:
            columns, example = [*columns, "text"], {**example, "text": example[text_field]}
        elif detect(columns, example, for_sft=True) is None:
            raise ConfigError(
                "no such column", where="dataset_text_field", value=text_field, allowed=", ".join(dataset.column_names)
            )
    where, rule = f"{name} data set", options.implicit_prompt
    spec = resolve(options.dataset_format, columns, example, where=where, for_sft=True, implicit_prompt=rule)
    if spec.kind in ("ranked", "rated", "unpaired"):
        raise DataError(
            f"rows of the format {spec.name} do not say which answer to learn",
            where=f"{name} data set",
            value=columns,
            remedy="load them with a pairing, or name the answer with `dataset_columns: {theirs: completion}`",
        )
    return spec


def _of_labels(stages: Stages) -> list[str]:
    """A finding where answers that are marked as undesirable would be learned."""
    columns = stages.dataset.column_names if stages.loaded is None else list(stages.loaded.columns)
    example = from_dataset(stages.name, stages.dataset).example() if stages.loaded is None else stages.loaded.example
    name = label_column(columns, example)
    if name is None or stages.columns.get(name) != NOT_USED:
        return []
    if name == "label" and not isinstance(example[name], bool) and str(example[name]).strip().isdigit():
        # A number of this name is the class of a text as often as a judgement of an answer.
        return []
    return [
        f"the column {name!r} marks answers as desirable or not, and those that are not are learned as well, as in TRL;"
        " leave them out, or learn from both with `preftune kto`"
    ]


def _setting_notes(spec: FormatSpec, worker: SftWorker, columns: Sequence[str]) -> list[str]:
    notes = []
    if spec.kind == "preference":
        notes.append("these are preference pairs: their chosen answers are trained on")
    if spec.name == "text" and ALPACA.detect(columns, {}):
        notes.append("the column of text is trained on; dataset_format: alpaca reads instruction and output instead")
    if worker.completion_only_loss and spec.name in ("text", "messages", "sharegpt"):
        notes.append(
            f"completion_only_loss has no effect on rows without a completion ({spec.name}): every token is trained on"
        )
    if worker.assistant_only_loss:
        if spec.name == "text":
            raise ConfigError(
                "assistant_only_loss needs conversations",
                where="assistant_only_loss",
                value=True,
                remedy="set it to false",
            )
        if not has_markers(worker.encoder):
            notes.append(
                "the chat template has no {% generation %} markers: assistant turns were located by rendering each"
                " conversation up to them"
            )
    return notes
