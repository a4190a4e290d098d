"""From rows to tokenised preference pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from preftune.data import batches
from preftune.data.batches import Outcome
from preftune.data.convert import canonical_rows, to_dataset
from preftune.data.environment import MASK_COLUMNS, cut, has_environment, own_words
from preftune.data.formats import FORMATS, FormatSpec, Row, resolve
from preftune.data.formats.base import FLOAT_EXTRAS, BadRow
from preftune.data.loader import load_columns
from preftune.data.options import DataOptions
from preftune.data.report import PrepareReport, check_weights
from preftune.data.rows import BadRowHandler, to_error
from preftune.data.stages import Stages
from preftune.data.tables import from_dataset
from preftune.data.tokenise import Masks, TokenisedPair, tokenise_pairs
from preftune.data.truncation import NOT_SCORED, TokenPair, truncate
from preftune.data.worker import RowWorker, place_of
from preftune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "rejected_prompt_ids")


class PairWorker(RowWorker):
    """Rows of one format to tokenised, truncated pairs.

    Args:
        tokenizer: Tokenizer of the model.
        options: Data options.
        spec: Format of the rows.
        name: Name of the data set, for messages.
    """

    floats = FLOAT_EXTRAS

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: DataOptions, spec: FormatSpec, name: str) -> None:
        super().__init__(tokenizer, options, spec.name, name)
        self.columns = PAIR_COLUMNS + MASK_COLUMNS * (options.environment_turns == "masked")

    def results(self, rows: Sequence[Row]) -> list[TokenisedPair | BadRow]:
        """Tokenised pairs before truncation, with their masks."""
        out: list[TokenisedPair | BadRow] = []
        pairs = tokenise_pairs(self.encoder, rows, self.options.append_eos, enclosed=self.options.enclose)
        for row, pair in zip(rows, pairs, strict=True):
            masks = pair if isinstance(pair, BadRow) else self.masks(row, pair)
            whole = isinstance(pair, TokenisedPair) and not isinstance(masks, BadRow)
            out.append(replace(pair, masks=masks) if whole else masks)  # type: ignore[type-var, arg-type]
        return out

    def masks(self, row: Row, result: TokenisedPair) -> Masks | BadRow:
        """Masks of both completions, without the turns that the model does not write; ``None`` for one without any."""
        out: list[list[int] | None] = []
        for field, ids in (("chosen", result.ids.chosen), ("rejected", result.ids.rejected)):
            if self.options.environment_turns != "masked" or not has_environment(row[field]):
                out.append(None)
                continue
            prompt = result.ids.prompt
            mask = own_words(
                self.encoder, row, field, [*prompt, *ids], len(prompt), self.encoder.tokenizer.eos_token_id
            )
            if isinstance(mask, BadRow):
                return mask
            out.append(mask)
        return out[0], out[1]

    def fill(self, outcome: Outcome, row: Row, result: TokenisedPair) -> None:
        """Enter a pair into its outcome."""
        options = self.options
        if options.enclose:
            result = replace(result, ids=enclosed(result.ids, self.encoder.tokenizer))
        pair, reason = truncate(result.ids, options.max_length, options.max_prompt_length, options.truncation_mode)
        completes = options.enclose or (options.append_eos and not isinstance(row["prompt"], str))
        appended = result.eos_missing and completes
        environment = has_environment(row["chosen"]) or has_environment(row["rejected"])
        outcome.flags |= (
            batches.MERGED * bool(result.merged)
            + batches.DOUBLED_BOS * result.doubled_bos
            + batches.EOS_MISSING * result.eos_missing
            + batches.EOS_APPENDED * appended
            + batches.ENVIRONMENT * environment
        )
        keep(outcome, result.ids, pair, reason)
        enter_masks(outcome, result.masks, options.truncation_mode, len(self.columns))
        outcome.floats = {name: row[name] for name in FLOAT_EXTRAS if name in row}


def enter_masks(outcome: Outcome, masks: Masks, mode: str, num_columns: int) -> None:
    """Add the masks of both completions to an outcome's lists; drop the row where nothing is left to score."""
    if not outcome.lists or num_columns == len(PAIR_COLUMNS):
        return
    prompt, chosen, rejected, other = outcome.lists
    assert prompt is not None
    assert chosen is not None
    assert rejected is not None
    kept = [cut(mask, list(ids), mode) for mask, ids in zip(masks, (chosen, rejected), strict=True)]
    for mask, before in zip(kept, (prompt, prompt if other is None else other), strict=True):
        if mask is not None and 1 not in (mask if before else mask[1:]):
            outcome.status, outcome.lists = NOT_SCORED, ()
            return
    outcome.lists = (prompt, chosen, rejected, other, *kept)


def enclosed(pair: TokenPair, tokenizer: PreTrainedTokenizerBase) -> TokenPair:
    """The pair between beginning- and end-of-sequence tokens; one that stands there already is not repeated."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompt = pair.prompt if bos is None or pair.prompt[:1] == [bos] else [bos, *pair.prompt]
    answers = (pair.chosen, pair.rejected)
    chosen, rejected = (ids if eos is None or ids[-1:] == [eos] else [*ids, eos] for ids in answers)
    return TokenPair(prompt, chosen, rejected)


class TokenisedWorker:
    """Pairs that are tokenised already: only truncation is left to do.

    Args:
        options: Data options.
        name: Name of the data set, for messages.
        masked: Whether the rows carry masks of their completions.
    """

    floats: tuple[str, ...] = FLOAT_EXTRAS

    def __init__(self, options: DataOptions, name: str, masked: bool = False) -> None:
        self.options = options
        self.name = name
        self.columns = PAIR_COLUMNS + MASK_COLUMNS * masked

    def outcomes(self, rows: list[dict[str, Any]], indices: Sequence[int]) -> list[Outcome]:
        """One outcome per row."""
        options = self.options
        out = []
        for row, index in zip(rows, indices, strict=True):
            for column in PAIR_COLUMNS[:3]:
                if not isinstance(row[column], list):
                    bad = BadRow("not_token_ids", column, f"{column!r} holds no list of token ids", value=row[column])
                    raise to_error(bad, place_of(self.name, index))
            before = TokenPair(
                row["prompt_ids"], row["chosen_ids"], row["rejected_ids"], row.get("rejected_prompt_ids")
            )
            outcome = Outcome(floats={name: row[name] for name in FLOAT_EXTRAS if row.get(name) is not None})
            pair, reason = truncate(before, options.max_length, options.max_prompt_length, options.truncation_mode)
            keep(outcome, before, pair, reason)
            masks = (row.get(MASK_COLUMNS[0]), row.get(MASK_COLUMNS[1]))
            enter_masks(outcome, masks, options.truncation_mode, len(self.columns))
            out.append(outcome)
        return out


def keep(outcome: Outcome, before: TokenPair, pair: TokenPair | None, reason: str | None) -> None:
    """Enter the result of truncation into an outcome."""
    if pair is None:
        outcome.status = reason or ""
        return
    outcome.flags |= batches.TRUNCATED * (pair.num_tokens < before.num_tokens)
    outcome.lists = (pair.prompt, pair.chosen, pair.rejected, pair.rejected_prompt)


def prepare(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, options: DataOptions, name: str = "train"
) -> tuple[Dataset, PrepareReport]:
    """Tokenise and truncate preference data.

    Args:
        dataset: Rows of any format, or a data set with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.
        tokenizer: Tokenizer of the model, with its chat template where the rows are conversations.
        options: Data options.
        name: Name of the data set, for messages and the report.

    Returns:
        A data set with ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, ``rejected_prompt_ids`` (null where it equals
        ``prompt_ids``), and ``margin``, ``weight`` or given reference log-probs where the rows carry them; and the
        report. Token ids, boundaries and truncation are those of TRL 1.16's ``DPOTrainer``, with two exceptions: a
        doubled BOS token is removed, and a pair with no scored token on one side is dropped.

    Raises:
        DataError: Bad rows that the policy does not allow, too many lost rows, or not preference data.
        ModelError: The tokenizer has no chat template or no end-of-sequence token.
    """
    stages = Stages.begin(dataset, options, name)
    worker: PairWorker | TokenisedWorker
    names = stages.dataset.column_names
    if all(column in names for column in PAIR_COLUMNS[:3]):
        worker = TokenisedWorker(options, name, MASK_COLUMNS[0] in names)
    else:
        spec = pair_format(stages.dataset, options, name)
        stages.read_as(spec)
        if spec.name in ("orca", "alpaca_preference"):
            question = "question" if spec.name == "orca" else "instruction"
            stages.notes.append(f"the prompt is the column {question!r}, not what both answers begin with")
        spec = pair_rows(stages, spec)
        worker = PairWorker(tokenizer, options, spec, name)
    result, tally = batches.run(stages.dataset, worker, options, f"Preparing {name}")
    stages.check(tally)
    check_weights(result, name)
    return result, stages.report(result, tally, *_lengths(result))


def pair_rows(stages: Stages, spec: FormatSpec) -> FormatSpec:
    """Make rows one pair each: ranked, rated and labelled rows are paired, all others stay as they are.

    Args:
        stages: Rows of a preference format.
        spec: Their format.

    Returns:
        Their format from now on.

    Raises:
        DataError: Bad rows that the policy does not allow.
    """
    if spec.kind not in ("ranked", "rated", "unpaired"):
        return spec
    handler = BadRowHandler(stages.options.on_bad_rows, stages.options.quarantine_path)
    where = f"{stages.name} data set"
    rows, notes = canonical_rows(from_dataset(where, stages.dataset), spec, handler)
    pairs = to_dataset(rows, where, [*handler.left_out(), *notes])
    stages.became(pairs, handler.counts, notes, handler.first)
    return FORMATS["preference"]


def pair_format(dataset: Dataset, options: DataOptions, name: str) -> FormatSpec:
    """The format of preference rows.

    Raises:
        DataError: The format is unknown, or holds no preferences.
    """
    example = from_dataset(name, dataset).example()
    spec = resolve(
        options.dataset_format,
        dataset.column_names,
        example,
        where=f"{name} data set",
        implicit_prompt=options.implicit_prompt,
    )
    if spec.kind == "sft":
        raise DataError(
            f"preference tuning needs chosen and rejected answers, and this is read as SFT data ({spec.name}); the"
            f" columns are {', '.join(load_columns(dataset))}",
            where=f"{name} data set",
            remedy="name the answers with `dataset_columns: {theirs: chosen, theirs: rejected}`, or use `preftune sft`",
        )
    return spec


def _lengths(result: Dataset) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """Lengths by part, and the numbers of prompt, chosen and rejected tokens."""
    import pyarrow.compute as pc

    table = result.data.table
    prompt, chosen, rejected = (pc.list_value_length(table[column]).to_numpy() for column in PAIR_COLUMNS[:3])
    own_prompt = pc.list_value_length(table["rejected_prompt_ids"])
    other = pc.coalesce(own_prompt, pc.list_value_length(table["prompt_ids"])).to_numpy()
    lengths = {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "prompt_and_chosen": prompt + chosen,
        "prompt_and_rejected": other + rejected,
    }
    num_prompt = int(prompt.sum()) + (pc.sum(own_prompt).as_py() or 0)
    return lengths, (num_prompt, int(chosen.sum()), int(rejected.sum()))
