"""Held-out pairs as an evaluation needs them: tokens, prompt groups, and where each row comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from preftune.data import DataOptions, batches, locations
from preftune.data.convert import canonical_rows, convert_row
from preftune.data.first_rows import look
from preftune.data.formats import FORMATS, column_uses, resolve
from preftune.data.preference import PAIR_COLUMNS, PairWorker, TokenisedWorker
from preftune.data.rows import NEUTRAL, BadRowHandler, left_out
from preftune.data.tables import RawTable
from preftune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Columns that are taken for the source of a row when none is named, if they have few values.
SOURCE_COLUMNS = ("subset", "source", "category", "task")
_MOST_SOURCES = 64
_SOURCE = "preftune_source"

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pair:
    """One tokenised pair.

    Attributes:
        prompt: Prompt tokens of the chosen sequence.
        chosen: Completion tokens.
        rejected: Completion tokens.
        rejected_prompt: Prompt tokens of the rejected sequence; the same as ``prompt`` but where truncation differed.
    """

    prompt: Ids
    chosen: Ids
    rejected: Ids
    rejected_prompt: Ids

    @property
    def item(self) -> tuple[tuple[Ids, Ids], tuple[Ids, Ids]]:
        """Both sequences as the scorer takes them."""
        return (self.prompt, self.chosen), (self.rejected_prompt, self.rejected)


@dataclass
class EvalPairs:
    """What is evaluated.

    Attributes:
        name: Name of the data.
        pairs: The pairs that are left after truncation.
        sources: Where each comes from, or ``None``.
        source_column: Column that says so.
        num_rows: Rows that were read.
        num_truncated: Kept pairs that were cut.
        dropped: Rows that were lost, by reason.
        notes: Lines for the user.
    """

    name: str
    pairs: list[Pair]
    sources: list[str] | None = None
    source_column: str | None = None
    num_rows: int = 0
    num_truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def groups(self) -> list[bytes]:
        """Pairs with the same prompt belong to one group."""
        return [pair.prompt.tobytes() for pair in self.pairs]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Completion tokens, ``(pairs, 2)``."""
        return np.array([[len(pair.chosen), len(pair.rejected)] for pair in self.pairs], dtype=np.int64)

    def scored(self) -> npt.NDArray[np.int64]:
        """Completion tokens that have a log-prob, ``(pairs, 2)``: all but the first of a sequence without a prompt."""
        first = [[not len(pair.prompt), not len(pair.rejected_prompt)] for pair in self.pairs]
        return self.lengths - np.array(first, dtype=np.int64)


def read_table(
    dataset: Any,
    *,
    split: str | None = None,
    config: str | None = None,
    columns: Sequence[str] | Mapping[str, str] | None = None,
) -> RawTable:
    """Raw rows of a data set.

    Args:
        dataset: Name of a data set, file or folder, or a ``datasets.Dataset``.
        split: Split, by default the test split where there is one, else the training split.
        config: Configuration of a data set on the Hub.
        columns: Columns to keep, or a mapping from their names to ours.

    Returns:
        The rows.

    Raises:
        ConfigError: Arguments that do not fit the data.
        DataError: Data that cannot be read.
    """
    if isinstance(dataset, str):
        origin = locations.find(dataset, config)
        known = locations.hub_splits(dataset, config) if origin.splits is None else origin.splits
        table = origin.read(split or ("test" if "test" in known else "train" if "train" in known else known[0]))
    else:
        if split is not None or config is not None:
            raise ConfigError("belongs to data given by name", where="split", value=split, remedy="leave it out")
        rows, _ = batches.materialise(dataset, "evaluation data")
        table = locations.from_dataset("evaluation data", rows)
    if columns is not None:
        missing = [name for name in columns if name not in table.raw_columns()]
        if missing:
            raise ConfigError(
                f"no such column: {', '.join(missing)}",
                where=f"columns of {table.name}",
                value=columns if isinstance(columns, Mapping) else list(columns),
                allowed=", ".join(table.raw_columns()),
            )
        if isinstance(columns, Mapping):
            table.rename = dict(columns)
        else:
            table.select = list(columns)
    return table


def prepare_pairs(
    table: RawTable,
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    *,
    source_column: str | None = None,
    pairing: str = "best_worst",
) -> EvalPairs:
    """Tokenise and truncate rows, as training would.

    Args:
        table: Rows of any preference format, or tokenised pairs.
        tokenizer: Tokenizer of the model.
        options: Data options.
        source_column: Column that says where a row comes from; by default the first of :data:`SOURCE_COLUMNS` with
            2 to 64 different texts.
        pairing: How pairs are made from ranked and from labelled answers.

    Returns:
        The pairs.

    Raises:
        ConfigError: There is no such source column.
        DataError: Bad rows that the policy does not allow, or no row is left.
    """
    columns = table.columns()
    if source_column is not None and source_column not in columns:
        raise ConfigError(
            "no such column", where="source_column", value=source_column, allowed=", ".join(sorted(columns))
        )
    handler = BadRowHandler(options.on_bad_rows, options.quarantine_path)
    notes: list[str] = []
    shown: list[str] = []
    worker: PairWorker | TokenisedWorker
    rows: list[dict[str, Any]]
    if all(name in columns for name in PAIR_COLUMNS[:3]):
        worker = TokenisedWorker(options, table.name)
        rows = [dict(row) | {_SOURCE: row.get(source_column)} for _, row in table]
    else:
        first = table.first()
        spec = resolve(options.dataset_format, columns, table.example(first), where=table.name)
        if spec.kind == "sft":
            raise DataError(
                f"an evaluation needs chosen and rejected answers, and this is SFT data ({spec.name})",
                where=table.name,
                value=columns,
                remedy="rename columns with dataset_columns: {theirs: ours}",
            )
        shown = look(spec, column_uses(spec, columns), first, table.name, lambda: (row for _, row in table))
        chosen_column = source_column or _guess_source(table, columns)
        if spec.kind in ("unpaired", "rated"):
            rows, notes = canonical_rows(table, spec, handler, pairing)
            chosen_column = None
            if notes and not rows:
                raise DataError(
                    f"no pair can be made: {notes[0]}",
                    where=table.name,
                    remedy="evaluate on pairs, or on prompts that have a good and a bad answer",
                )
        else:
            rows = [
                canonical | {_SOURCE: row.get(chosen_column) if isinstance(row, Mapping) else None}
                for place, row in table
                for canonical in convert_row(row, place, spec, handler, pairing)
            ]
        if source_column is not None and chosen_column is None:
            raise ConfigError(
                "pairs made of labelled answers have no source of their own",
                where="source_column",
                value=source_column,
                remedy="leave it out",
            )
        source_column = chosen_column
        worker = PairWorker(tokenizer, options, FORMATS["preference"], table.name)
    found = _run(worker, rows, table.name, source_column)
    found.num_rows = len(table)
    found.notes = [*shown, *notes, *found.notes]
    _count_lost(found, handler, options, table.name)
    return found


def _count_lost(found: EvalPairs, handler: BadRowHandler, options: DataOptions, name: str) -> None:
    """Enter rows that were left out, and refuse to go on without too many of them."""
    lost = left_out(handler.counts, options.on_bad_rows)
    found.dropped = dict(Counter(found.dropped) + Counter(lost))
    num_lost = sum(count for reason, count in found.dropped.items() if reason not in NEUTRAL)
    most = options.max_dropped_share
    if most is not None and num_lost > most * (len(found.pairs) + num_lost):
        raise DataError(
            f"{num_lost} of {len(found.pairs) + num_lost} rows are lost: {_reasons(found.dropped)}",
            where=name,
            allowed=f"up to {most:.0%}",
            remedy="raise max_length, correct the data, or set allow_drops",
        )


def _reasons(counts: Mapping[str, int]) -> str:
    """Why rows are lost, in words: ``3 prompt too long``."""
    return ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in counts.items())


def _guess_source(table: RawTable, columns: Sequence[str]) -> str | None:
    for name in SOURCE_COLUMNS:
        if name not in columns:
            continue
        values = {row.get(name) for _, row in table if isinstance(row, Mapping)}
        if 2 <= len(values) <= _MOST_SOURCES and all(isinstance(value, str) for value in values):
            return name
    return None


def _run(worker: Any, rows: list[dict[str, Any]], name: str, source_column: str | None) -> EvalPairs:
    pairs: list[Pair] = []
    sources: list[str] = []
    dropped: Counter[str] = Counter()
    num_truncated = 0
    for start in range(0, len(rows), batches.BATCH_SIZE):
        part = rows[start : start + batches.BATCH_SIZE]
        for row, outcome in zip(part, worker.outcomes(part, range(start, start + len(part))), strict=True):
            if outcome.status:
                dropped[outcome.bad or outcome.status] += 1
                continue
            prompt, chosen, rejected = (np.asarray(ids, dtype=np.int64) for ids in outcome.lists[:3])
            other = prompt if outcome.lists[3] is None else np.asarray(outcome.lists[3], dtype=np.int64)
            pairs.append(Pair(prompt, chosen, rejected, other))
            sources.append(str(row.get(_SOURCE)))
            num_truncated += bool(outcome.flags & batches.TRUNCATED)
    if not pairs:
        raise DataError(
            f"no row is left of {len(rows)}: {_reasons(dropped) or 'empty'}",
            where=name,
            remedy="raise max_length, or correct the data",
        )
    notes = []
    if dropped:
        notes.append(f"{sum(dropped.values())} of {len(rows)} rows are not evaluated: {_reasons(dropped)}")
    if num_truncated:
        notes.append(f"{num_truncated} of {len(pairs)} pairs were cut to max_length")
    return EvalPairs(
        name=name,
        pairs=pairs,
        sources=sources if source_column else None,
        source_column=source_column,
        num_truncated=num_truncated,
        dropped=dict(dropped),
        notes=notes,
    )
