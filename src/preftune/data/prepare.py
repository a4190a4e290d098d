"""From rows to tokenised preference pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from preftune.data import batches
from preftune.data.batches import Outcome
from preftune.data.convert import canonical_rows, convert_row, to_dataset
from preftune.data.environment import MASK_COLUMNS, cut, has_environment, own_words
from preftune.data.formats import FORMATS, FormatSpec, Row, column_uses, resolve
from preftune.data.formats.base import FLOAT_EXTRAS, BadRow
from preftune.data.options import DataOptions
from preftune.data.report import PrepareReport, build_report, check_weights
from preftune.data.rows import BadRowHandler, left_out, to_error
from preftune.data.sources import load_report
from preftune.data.tables import from_dataset
from preftune.data.tokenise import Encoder, TokenisedPair, tokenise_pairs
from preftune.data.transcripts import as_conversation
from preftune.data.truncate import NOT_SCORED, TokenPair, truncate
from preftune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Masks = tuple[list[int] | None, list[int] | None]

PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "rejected_prompt_ids")


def place_of(name: str, index: int) -> str:
    """How messages call row ``index`` of a data set."""
    return f"{name} data set, row {index} (the first is 0)"


def canonical_batch(
    raw: Sequence[Any],
    indices: Sequence[int],
    spec: FormatSpec,
    name: str,
    handler: BadRowHandler,
    as_messages: bool | None = None,
) -> tuple[list[Outcome], list[int], list[Row]]:
    """Convert and check a batch of rows that are one example each.

    Args:
        raw: Rows as they are in the data set.
        indices: Their row numbers.
        spec: Their format.
        name: Name of the data set, for messages.
        handler: Decides about bad rows.
        as_messages: Whether transcripts become conversations; ``None`` does not look for them.

    Returns:
        One outcome per row, with the bad ones marked; and positions and canonical rows of those to go on with.
    """
    outcomes: list[Outcome] = []
    positions: list[int] = []
    rows: list[Row] = []
    found: list[Row] = []

    def then(row: Row) -> Row:
        conversation = None if as_messages is None else as_conversation(row)
        if conversation is not None:
            found.append(conversation)
        return conversation if conversation is not None and as_messages else row

    for position, (row, index) in enumerate(zip(raw, indices, strict=True)):
        handler.reason = ""
        found.clear()
        converted = convert_row(row, place_of(name, index), spec, handler, then=then)
        flags = batches.TRANSCRIPT * bool(found)
        outcomes.append(Outcome(status="" if converted else batches.BAD, bad=handler.reason, flags=flags))
        if converted:
            positions.append(position)
            rows.append(converted[0])
    return outcomes, positions, rows


def reads_transcripts(encoder: Encoder, options: DataOptions) -> bool | None:
    """Whether transcripts become conversations; ``None`` where there is no template that could render them."""
    return options.transcripts == "messages" if encoder.has_template else None


def note_lost(encoder: Encoder, row: Row, outcome: Outcome, handler: BadRowHandler, place: str, raw: Any) -> None:
    """Count a row that is trained on although its rendering lacks a turn."""
    lost = encoder.lost.pop(id(row), None)
    if lost is not None and handler.keep(lost, place, raw):
        outcome.bad = outcome.bad or lost.reason


class PairWorker:
    """Rows of one format to tokenised, truncated pairs.

    Args:
        tokenizer: Tokenizer of the model.
        options: Data options.
        spec: Format of the rows.
        name: Name of the data set, for messages.
    """

    floats = FLOAT_EXTRAS

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: DataOptions, spec: FormatSpec, name: str) -> None:
        self.encoder = Encoder(tokenizer, options.chat_template, keeps_lost=options.on_bad_rows == "warn")
        self.options = options
        self.columns = PAIR_COLUMNS + MASK_COLUMNS * (options.environment_turns == "masked")
        # The table of formats, not the format: its functions need not be picklable.
        self.format = spec.name
        self.name = name

    def canonical(
        self, raw: Sequence[Any], indices: Sequence[int], handler: BadRowHandler
    ) -> tuple[list[Outcome], list[int], list[Row]]:
        """Outcomes with the bad rows marked, and positions and canonical rows of those to go on with."""
        as_messages = reads_transcripts(self.encoder, self.options)
        return canonical_batch(raw, indices, FORMATS[self.format], self.name, handler, as_messages)

    def outcomes(self, rows: list[dict[str, Any]], indices: Sequence[int]) -> list[Outcome]:
        """One outcome per row."""
        handler = BadRowHandler(self.options.on_bad_rows, self.options.quarantine_path)
        outcomes, positions, canonical = self.canonical(rows, indices, handler)
        results = tokenise_pairs(self.encoder, canonical, self.options.append_eos, enclosed=self.options.enclose)
        for position, row, result in zip(positions, canonical, results, strict=True):
            place = place_of(self.name, indices[position])
            masks = result if isinstance(result, BadRow) else self.masks(row, result)
            if isinstance(result, BadRow) or isinstance(masks, BadRow):
                bad = result if isinstance(result, BadRow) else masks
                assert isinstance(bad, BadRow)
                handler.keep(bad, place, rows[position], converted=False)
                outcomes[position] = Outcome(status=batches.BAD, bad=bad.reason)
            else:
                note_lost(self.encoder, row, outcomes[position], handler, place, rows[position])
                self._fill(outcomes[position], row, result, masks)
        self._add_example(outcomes, results)
        return outcomes

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

    def _fill(self, outcome: Outcome, row: Row, result: TokenisedPair, masks: Masks) -> None:
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
        enter_masks(outcome, masks, options.truncation_mode, len(self.columns))
        outcome.floats = {name: row[name] for name in FLOAT_EXTRAS if name in row}

    def _add_example(self, outcomes: list[Outcome], results: Sequence[TokenisedPair | BadRow]) -> None:
        merged = next((r.merged for r in results if isinstance(r, TokenisedPair) and r.merged), None)
        if merged is not None:
            outcomes[0].example = str(self.encoder.tokenizer.decode(merged))


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
    loaded = load_report(dataset)
    dataset, notes = batches.materialise(dataset, name)
    worker: PairWorker | TokenisedWorker
    bad_before: dict[str, int] = {}
    rows_read = len(dataset)
    if all(column in dataset.column_names for column in PAIR_COLUMNS[:3]):
        format_name, columns = "tokenised", dict[str, str]()
        worker = TokenisedWorker(options, name, MASK_COLUMNS[0] in dataset.column_names)
    else:
        spec = pair_format(dataset, options, name)
        format_name, columns = spec.name, column_uses(spec, dataset.column_names)
        if spec.name in ("orca", "alpaca_preference"):
            notes.append(f"the prompt is the column {spec.required[0]!r}, not what both answers begin with")
        dataset, spec, bad_before, more = pair_rows(dataset, spec, options, name)
        notes += more
        worker = PairWorker(tokenizer, options, spec, name)
    result, tally = batches.run(dataset, worker, options, f"Preparing {name}")
    earlier = loaded.bad_rows if loaded else {}
    bad = sum_counts(bad_before, tally.bad, earlier)
    lost_before = sum_counts(earlier, left_out(bad_before, options.on_bad_rows))
    rows_read = max(rows_read, len(dataset)) + (loaded.num_lost if loaded else 0)
    batches.check_share(tally, rows_read, lost_before, options.max_dropped_share, name)
    lengths, tokens = _lengths(result)
    return result, build_report(
        name=name,
        format_name=format_name,
        rows_read=rows_read,
        rows_kept=len(result),
        tally=tally,
        bad_rows=bad,
        options=options,
        notes=[*(loaded.notes if loaded else ()), *notes],
        lengths=lengths,
        tokens=tokens,
        columns=dict(loaded.columns) if loaded else columns,
        weights=check_weights(result, name),
    )


def pair_rows(
    dataset: Dataset, spec: FormatSpec, options: DataOptions, name: str
) -> tuple[Dataset, FormatSpec, dict[str, int], list[str]]:
    """Rows that are one pair each: ranked and unpaired rows are paired, all others returned as they are.

    Args:
        dataset: Rows of a preference format.
        spec: Their format.
        options: Data options.
        name: Name of the data set, for messages.

    Returns:
        The rows, their format, bad rows by reason, and notes for the user.

    Raises:
        DataError: Bad rows that the policy does not allow.
    """
    if spec.kind not in ("ranked", "rated", "unpaired"):
        return dataset, spec, {}, []
    handler = BadRowHandler(options.on_bad_rows, options.quarantine_path)
    rows, notes = canonical_rows(from_dataset(f"{name} data set", dataset), spec, handler)
    pairs = to_dataset(rows, f"{name} data set", [*handler.left_out(), *notes])
    return pairs, FORMATS["preference"], dict(handler.counts), notes


def sum_counts(*counts: Mapping[str, int]) -> dict[str, int]:
    """Counts added up by reason."""
    out: dict[str, int] = {}
    for some in counts:
        for reason, count in some.items():
            out[reason] = out.get(reason, 0) + count
    return out


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
            f"preference tuning needs chosen and rejected answers, and this is SFT data ({spec.name})",
            where=f"{name} data set",
            value=dataset.column_names,
            remedy="use `preftune sft`, or rename columns with `columns: {theirs: ours}`",
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
