"""Rows of one source or several on their way to canonical rows, and the report about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from preftune.data.batches import refuse_images
from preftune.data.convert import canonical_rows, in_one_form, to_dataset
from preftune.data.first_rows import look
from preftune.data.formats import Row, column_uses, resolve
from preftune.data.rows import BadRowHandler, left_out
from preftune.data.tables import RawTable
from preftune.data.unused_columns import overlooked

if TYPE_CHECKING:
    from datasets import Dataset

# Datasets carry no room for such facts; `prepare` looks for this attribute to report on both stages together.
_REPORT_ATTRIBUTE = "_preftune_load_report"


@dataclass(frozen=True)
class LoadReport:
    """What happened to rows on their way from the source to canonical rows.

    Attributes:
        rows_read: Rows that were found.
        bad_rows: Rows that were left out, by reason. Bad rows that stay are found again when they are prepared.
        formats: Format of each source.
        notes: Lines for the user.
        columns: Column -> what is done with it.
        overlooked: Columns that hold a part of the conversation, and are not used.
        findings: What the first rows show that a user should know.
        example: An early row as it was found.
        first: Place and problem of the first row that was left out; empty where none was.
    """

    rows_read: int
    bad_rows: dict[str, int]
    formats: dict[str, str]
    notes: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    overlooked: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    example: Mapping[str, Any] = field(default_factory=dict)
    first: str = ""

    @property
    def num_lost(self) -> int:
        """Rows that were left out."""
        return sum(self.bad_rows.values())


def load_report(dataset: Any) -> LoadReport | None:
    """The report of the loading that made ``dataset``, if that is where it comes from, unchanged."""
    report = getattr(dataset, _REPORT_ATTRIBUTE, None)
    return report if isinstance(report, LoadReport) else None


def load_columns(dataset: Any) -> list[str]:
    """Names of the columns of the source, not those that loading made of them."""
    report = load_report(dataset)
    return list(dataset.column_names if report is None else report.columns)


def carry_report(source: Any, part: Any) -> None:
    """Let a part of loaded rows carry the report of all of them."""
    setattr(part, _REPORT_ATTRIBUTE, load_report(source))


@dataclass
class Loader:
    """Makes canonical rows of tables, and keeps count.

    Attributes:
        dataset_format: ``auto``, or the format of all tables.
        pairing: What to do with ranked and labelled answers.
        handler: Decides about bad rows.
        for_sft: Prefer what supervised fine-tuning reads.
        implicit_prompt: How the prompt is found where rows have none.
    """

    dataset_format: str
    pairing: str
    handler: BadRowHandler
    for_sft: bool
    implicit_prompt: str
    rows_read: int = 0
    formats: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    overlooked: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    example: Mapping[str, Any] = field(default_factory=dict)

    def rows(self, table: RawTable) -> list[Row]:
        """Canonical rows of a table."""
        columns, first = table.columns(), table.first()
        example = table.example(first)
        refuse_images(columns, (row for _, row in table), table.name)
        spec = resolve(
            self.dataset_format,
            columns,
            example,
            where=table.name,
            for_sft=self.for_sft,
            implicit_prompt=self.implicit_prompt,
        )
        rows, notes = canonical_rows(table, spec, self.handler, self.pairing)
        self.rows_read += len(table)
        self.formats[table.name] = spec.name
        uses = column_uses(spec, columns, for_sft=self.for_sft)
        self.columns |= uses
        self.overlooked += [name for name in overlooked(spec, uses, first) if name not in self.overlooked]
        self.findings += look(spec, uses, first, table.name, lambda: (row for _, row in table))
        self.example = self.example or example
        self.notes += [f"{table.name}: {note}" for note in notes]
        return rows

    def another(self) -> Loader:
        """A loader of the same settings with counts of its own."""
        handler = BadRowHandler(self.handler.policy, self.handler.quarantine_path)
        return Loader(self.dataset_format, self.pairing, handler, self.for_sft, self.implicit_prompt)

    def dataset(self, rows: list[Row], where: str) -> Dataset:
        """Rows as a data set that carries the report of this loader."""
        return self.signed(self.unsigned(rows, where))

    def unsigned(self, rows: list[Row], where: str) -> Dataset:
        """Rows as a data set, text among conversations as conversations too."""
        rows, num_texts = in_one_form(rows)
        if num_texts:
            self.findings.append(
                f"{num_texts} of {len(rows)} rows are text and the others conversations: the text was made a question"
                " and its answer, so that all are given to the model with its chat template"
            )
        return to_dataset(rows, where, self.lost())

    def lost(self) -> list[str]:
        """What became of rows that did not come out."""
        return [*self.handler.left_out(), *self.notes]

    def signed(self, dataset: Dataset) -> Dataset:
        """The data set with the report of this loader."""
        report = LoadReport(
            self.rows_read,
            left_out(self.handler.counts, self.handler.policy),
            dict(self.formats),
            tuple(self.notes),
            dict(self.columns),
            tuple(self.overlooked),
            tuple(self.findings),
            self.example,
            self.handler.first,
        )
        setattr(dataset, _REPORT_ATTRIBUTE, report)
        return dataset
