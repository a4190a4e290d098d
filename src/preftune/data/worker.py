"""What workers on rows have in common: canonical rows, bad ones set apart, tokens, and what was noticed on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from preftune.data import batches
from preftune.data.batches import Outcome
from preftune.data.convert import convert_row, presented
from preftune.data.formats import FORMATS, FormatSpec, Row
from preftune.data.formats.base import BadRow
from preftune.data.options import DataOptions
from preftune.data.rows import BadRowHandler
from preftune.data.tokenise import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def place_of(name: str, index: int) -> str:
    """How messages call row ``index`` of a data set."""
    return f"{name} data set, row {index} (the first is 0)"


def sum_counts(*counts: Mapping[str, int]) -> dict[str, int]:
    """Counts added up by reason."""
    out: dict[str, int] = {}
    for some in counts:
        for reason, count in some.items():
            out[reason] = out.get(reason, 0) + count
    return out


def repeats_prompt(row: Row) -> bool:
    """Whether the answers of a row of text begin with its whole prompt. One word may well begin an answer as well."""
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or " " not in prompt.strip():
        return False
    answers = [row[name] for name in ("chosen", "rejected", "completion") if name in row]
    return bool(answers) and all(isinstance(one, str) and one.startswith(prompt.rstrip()) for one in answers)


class RowWorker:
    """Rows of one format to tokens; subclasses say to which.

    Args:
        tokenizer: Tokenizer of the model.
        options: Data options.
        format_name: Format of the rows. Its name, not the format: its functions need not be picklable.
        name: Name of the data set, for messages.
    """

    floats: tuple[str, ...] = ()

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: DataOptions, format_name: str, name: str) -> None:
        self.encoder = Encoder(tokenizer, options.chat_template, keeps_lost=options.on_bad_rows == "warn")
        self.options = options
        self.format = format_name
        self.name = name

    @property
    def spec(self) -> FormatSpec:
        """The format of the rows."""
        return FORMATS[self.format]

    def results(self, rows: Sequence[Row]) -> Sequence[Any]:
        """What tokenising makes of checked canonical rows, each with its ``merged``, or a :class:`BadRow`."""
        raise NotImplementedError

    def fill(self, outcome: Outcome, row: Row, result: Any) -> None:
        """Enter the result of one row into its outcome."""
        raise NotImplementedError

    def canonical(
        self, raw: Sequence[Any], indices: Sequence[int], handler: BadRowHandler
    ) -> tuple[list[Outcome], list[int], list[Row]]:
        """Convert and check a batch of rows that are one example each.

        Args:
            raw: Rows as they are in the data set.
            indices: Their row numbers.
            handler: Decides about bad rows.

        Returns:
            One outcome per row, with the bad ones marked; and positions and canonical rows of those to go on with.
        """
        spec = self.spec
        outcomes: list[Outcome] = []
        positions: list[int] = []
        rows: list[Row] = []
        kinds: set[str] = set()

        def then(row: Row) -> Row:
            # Text stays what it is where there is no template that could render it.
            if not self.encoder.has_template:
                return row
            shown, kind = presented(row, self.options)
            kinds.add(kind)
            return shown

        for position, (row, index) in enumerate(zip(raw, indices, strict=True)):
            handler.reason = ""
            kinds.clear()
            converted = convert_row(row, place_of(self.name, index), spec, handler, then=then)
            flags = batches.TRANSCRIPT * ("transcript" in kinds) + batches.PLAIN * ("plain" in kinds)
            flags += batches.REPEATED * any(map(repeats_prompt, converted))
            outcomes.append(Outcome(status="" if converted else batches.BAD, bad=handler.reason, flags=flags))
            if converted:
                positions.append(position)
                rows.append(converted[0])
        return outcomes, positions, rows

    def outcomes(self, rows: list[dict[str, Any]], indices: Sequence[int]) -> list[Outcome]:
        """One outcome per row."""
        handler = BadRowHandler(self.options.on_bad_rows, self.options.quarantine_path)
        outcomes, positions, canonical = self.canonical(rows, indices, handler)
        merged: Sequence[int] = ()
        for position, row, result in zip(positions, canonical, self.results(canonical), strict=True):
            place = place_of(self.name, indices[position])
            if isinstance(result, BadRow):
                handler.keep(result, place, rows[position], converted=False)
                outcomes[position] = Outcome(status=batches.BAD, bad=result.reason)
                continue
            self._note_lost(row, outcomes[position], handler, place, rows[position])
            merged = merged or result.merged
            self.fill(outcomes[position], row, result)
        if merged:
            outcomes[0].example = str(self.encoder.tokenizer.decode(list(merged)))
        if handler.first:
            outcomes[0].problem = handler.first
        return outcomes

    def _note_lost(self, row: Row, outcome: Outcome, handler: BadRowHandler, place: str, raw: Any) -> None:
        """Count a row that is trained on although its rendering lacks a turn."""
        lost = self.encoder.lost.pop(id(row), None)
        if lost is not None and handler.keep(lost, place, raw):
            outcome.bad = outcome.bad or lost.reason
