"""From labelled answers, or from pairs taken apart, to tokenised examples for KTO.

An example is laid out as a pair is: the completion stands as the chosen answer, and a completion of another prompt,
from which KTO estimates how far the policy has moved, as the rejected one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from preftune.data import batches
from preftune.data.batches import Outcome, list_array
from preftune.data.convert import canonical_rows, to_dataset
from preftune.data.environment import MASK_COLUMNS, has_environment, own_words
from preftune.data.formats import FORMATS, Row, resolve
from preftune.data.formats.base import BadRow, common_prefix
from preftune.data.formats.unpaired import LABELS, label_remedy
from preftune.data.options import DataOptions
from preftune.data.preference import TokenisedWorker, pair_rows
from preftune.data.report import PrepareReport, check_weights
from preftune.data.rows import BadRowHandler
from preftune.data.stages import Stages
from preftune.data.tables import from_dataset
from preftune.data.tokenise import sequences
from preftune.data.truncation import TokenPair, truncate
from preftune.data.worker import RowWorker, sum_counts
from preftune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

FLOATS = ("label", "weight")
TOKENISED = ("prompt_ids", "chosen_ids", "rejected_ids", "label")

# Pairs are taken apart in blocks of this size, first all chosen answers and then all rejected ones, as TRL does.
_BLOCK = 1000


@dataclass(frozen=True)
class Answer:
    """One tokenised answer before truncation.

    Attributes:
        prompt: Tokens before the completion.
        completion: Tokens of the completion.
        merged: End of the tokenised prompt that the sequence does not contain.
        flags: What happened to it, as in :mod:`preftune.data.batches`.
        mask: 1 for every token of the completion that the model writes; ``None`` where it writes all.
    """

    prompt: list[int]
    completion: list[int]
    merged: list[int]
    flags: int
    mask: list[int] | None = None


class UnpairedWorker(RowWorker):
    """Labelled answers to token ids, not truncated yet.

    Args:
        tokenizer: Tokenizer of the model.
        options: Data options.
        name: Name of the data set, for messages.
        checked: The rows were checked, and the bad ones among them counted, while they were pairs.
        format_name: Format of the rows.
    """

    floats = FLOATS

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: DataOptions,
        name: str,
        *,
        checked: bool = False,
        format_name: str = "unpaired",
    ) -> None:
        super().__init__(tokenizer, options, format_name, name)
        self.checked = checked
        self.columns: tuple[str, ...] = ("prompt_ids", "chosen_ids")
        if options.environment_turns == "masked":
            self.columns = (*self.columns, MASK_COLUMNS[0])

    def canonical(
        self, raw: Sequence[Any], indices: Sequence[int], handler: BadRowHandler
    ) -> tuple[list[Outcome], list[int], list[Row]]:
        """As for any rows; those that were checked before are not counted again."""
        outcomes, positions, rows = super().canonical(raw, indices, handler)
        for outcome in outcomes:
            outcome.bad = "" if self.checked else outcome.bad
        return outcomes, positions, rows

    def results(self, rows: Sequence[Row]) -> list[Answer | BadRow]:
        """Answers before truncation."""
        parts = sequences(self.encoder, rows, ("completion",))
        return [one if isinstance(one, BadRow) else self.answer(row, one) for row, one in zip(rows, parts, strict=True)]

    def answer(self, row: Row, parts: list[list[int]]) -> Answer | BadRow:
        """A row's tokens before truncation.

        Args:
            row: Canonical row.
            parts: Token ids of its prompt alone, and of the prompt with the completion.

        Returns:
            Its prompt and completion; a :class:`BadRow` where turns that the model does not write cannot be located.
        """
        encoder = self.encoder
        plain = isinstance(row["prompt"], str)
        prompt, whole = (encoder.drop_doubled_bos(ids) for ids in parts) if plain else parts
        start = common_prefix(prompt, whole)
        completion = whole[start:]
        missing = not encoder.ends_with_eos(completion)
        appended = missing and self.options.append_eos and not plain
        flags = (
            batches.MERGED * (start < len(prompt))
            + batches.DOUBLED_BOS * (plain and len(whole) < len(parts[1]))
            + batches.EOS_MISSING * missing
            + batches.EOS_APPENDED * appended
            + batches.ENVIRONMENT * has_environment(row["completion"])
        )
        mask: list[int] | BadRow | None = None
        if self.options.environment_turns == "masked" and has_environment(row["completion"]):
            mask = own_words(encoder, row, "completion", whole, start)
        if isinstance(mask, BadRow):
            return mask
        completion = encoder.append_eos(completion) if appended else completion
        if mask is not None:
            mask += [1] * (len(completion) - len(mask))
        return Answer(whole[:start], completion, prompt[start:], flags, mask)

    def fill(self, outcome: Outcome, row: Row, result: Answer) -> None:
        """Enter an answer into its outcome."""
        options, found = self.options, result
        outcome.flags |= found.flags
        outcome.floats = {"label": float(row["label"]), **({"weight": row["weight"]} if "weight" in row else {})}
        kept, reason = truncate(
            TokenPair(found.prompt, found.completion, found.completion),
            options.max_length,
            options.max_prompt_length,
            options.truncation_mode,
        )
        outcome.status = "" if kept else str(reason)
        # Whole for now: its counterpart may have room for more of it.
        whole = (found.prompt, found.completion, found.mask)
        outcome.lists = whole[: len(self.columns)] if kept else ()


class _TruncatingWorker(TokenisedWorker):
    """Truncation of tokenised examples, labels kept."""

    floats: tuple[str, ...] = FLOATS

    def outcomes(self, rows: list[dict[str, Any]], indices: Sequence[int]) -> list[Outcome]:
        """One outcome per row."""
        out = super().outcomes(rows, indices)
        for outcome, row in zip(out, rows, strict=True):
            outcome.floats = {name: row[name] for name in FLOATS if row.get(name) is not None}
        return out


def prepare_unpaired(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    name: str = "train",
    *,
    block: int | None = None,
) -> tuple[Dataset, PrepareReport]:
    """Tokenise and truncate labelled answers.

    Args:
        dataset: Rows of prompt, completion and label; rows of a preference format, which are taken apart; or a data set
            that this function has returned before.
        tokenizer: Tokenizer of the model, with its chat template where the rows are conversations.
        options: Data options.
        name: Name of the data set, for messages and the report.
        block: Number of successive examples among which completions are exchanged, each prompt getting the completion
            of the example before it and the first the last's; ``None`` repeats an example's own completion.

    Returns:
        A data set with ``prompt_ids``, ``chosen_ids`` (the completion), ``rejected_ids`` (the exchanged one),
        ``rejected_prompt_ids`` (null where it equals ``prompt_ids``), ``label`` (1 for desirable, 0 for not) and
        ``weight`` where the rows carry it; and the report. Token ids, order and, with TRL's batch size as ``block``,
        exchanged completions are those of TRL 1.16's ``KTOTrainer``, but a doubled BOS token is removed, and an
        example with no scored token is dropped.

    Raises:
        DataError: Bad rows that the policy does not allow, too many lost rows, or no labelled answers.
        ModelError: The tokenizer has no chat template or no end-of-sequence token.
    """
    stages = Stages.begin(dataset, options, name)
    before: batches.Tally | None = None
    if all(column in stages.dataset.column_names for column in TOKENISED):
        whole = stages.dataset
    else:
        format_name = labelled_rows(stages)
        checked = FORMATS[stages.format].kind != "unpaired"
        worker = UnpairedWorker(tokenizer, options, name, checked=checked, format_name=format_name)
        whole, before = batches.run(stages.dataset, worker, options, f"Preparing {name}")
        whole = _with_exchanged(whole, block) if len(whole) else whole
        stages.check(before)
    cutting = _TruncatingWorker(options, name, MASK_COLUMNS[0] in whole.column_names)
    result, tally = batches.run(whole, cutting, options, f"Truncating {name}")
    if before is not None:
        stages.check(tally, sum_counts(before.dropped, before.bad if before.num_bad_left_out else {}))
        tally = _with_truncation(before, tally)
    else:
        stages.check(tally)
    check_weights(result, name)
    return result, stages.report(result, tally, *_lengths(result))


def labelled_rows(stages: Stages) -> str:
    """Make rows prompt, completion and label; pairs are taken apart.

    Args:
        stages: Such rows, or rows of a preference format.

    Returns:
        Name of their format from now on.

    Raises:
        DataError: Bad rows that the policy does not allow, or data for supervised fine-tuning.
    """
    dataset, options, name = stages.dataset, stages.options, stages.name
    example = from_dataset(name, dataset).example()
    spec = resolve(
        options.dataset_format,
        dataset.column_names,
        example,
        where=f"{name} data set",
        implicit_prompt=options.implicit_prompt,
    )
    stages.read_as(spec)
    if spec.kind == "unpaired":
        return spec.name
    if spec.kind == "sft":
        # The columns of the source tell more than those that loading made of them.
        found = example if stages.loaded is None else stages.loaded.example
        raise DataError(
            f"labelled answers are needed, and no column says which answers are desirable ({spec.name})",
            where=f"{name} data set",
            value=list(found),
            allowed=f"a column {', '.join(LABELS)} of true and false",
            remedy=label_remedy(found),
        )
    spec = pair_rows(stages, spec)
    handler = BadRowHandler(options.on_bad_rows, options.quarantine_path)
    rows, more = canonical_rows(from_dataset(f"{name} data set", stages.dataset), spec, handler)
    notes = [*more, f"{len(rows)} pairs were taken apart into desirable and undesirable answers"]
    answers = to_dataset(list(_taken_apart(rows)), f"{name} data set", handler.left_out())
    stages.became(answers, sum_counts(stages.bad_before, handler.counts), notes, handler.first)
    return "unpaired"


def _with_exchanged(whole: Dataset, block: int | None) -> Dataset:
    """Examples with a completion of another prompt beside their own."""
    from datasets import Dataset as HFDataset

    whole = whole.add_column("rejected_ids", _exchanged(whole["chosen_ids"], block))
    if MASK_COLUMNS[0] not in whole.column_names:
        return whole
    exchanged = list_array(_exchanged(whole[MASK_COLUMNS[0]], block))
    return HFDataset(whole.data.table.append_column(MASK_COLUMNS[1], exchanged))


def _taken_apart(pairs: Sequence[Row]) -> Iterable[Row]:
    for start in range(0, len(pairs), _BLOCK):
        for side, label in (("chosen", True), ("rejected", False)):
            for pair in pairs[start : start + _BLOCK]:
                rest = {key: value for key, value in pair.items() if key not in ("prompt", "chosen", "rejected")}
                yield {"prompt": pair["prompt"], "completion": pair[side], "label": label, **rest}


def _exchanged(completions: Sequence[Any], block: int | None) -> list[Any]:
    if block is None:
        return list(completions)
    out: list[Any] = []
    for start in range(0, len(completions), block):
        part = list(completions[start : start + block])
        out += [part[-1], *part[:-1]]
    return out


def _with_truncation(first: batches.Tally, second: batches.Tally) -> batches.Tally:
    from dataclasses import replace

    return replace(first, num_truncated=second.num_truncated, dropped=sum_counts(first.dropped, second.dropped))


def _lengths(result: Dataset) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """Lengths by part, and the numbers of prompt, desirable and undesirable tokens."""
    import numpy as np
    import pyarrow.compute as pc

    table = result.data.table
    prompt, completion = (pc.list_value_length(table[column]).to_numpy() for column in ("prompt_ids", "chosen_ids"))
    desirable = np.asarray(table["label"].to_numpy()) > 0
    lengths = {"prompt": prompt, "completion": completion, "prompt_and_completion": prompt + completion}
    return lengths, (int(prompt.sum()), int(completion[desirable].sum()), int(completion[~desirable].sum()))
