"""The stages of preparing a data set that are the same for pairs, labelled answers and supervised examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from preftune.data import batches
from preftune.data.arrow import with_class_names
from preftune.data.batches import Tally
from preftune.data.first_rows import look
from preftune.data.formats import FormatSpec, column_uses
from preftune.data.loader import LoadReport, load_report
from preftune.data.options import DataOptions
from preftune.data.report import PrepareReport, build_report, range_of
from preftune.data.rows import left_out
from preftune.data.script_words import in_python
from preftune.data.tables import from_dataset
from preftune.data.unused_columns import overlooked
from preftune.data.worker import sum_counts

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Stages:
    """One data set on its way to tokens, with what is to be reported about it.

    Attributes:
        dataset: Rows to go on with.
        options: Data options.
        name: Name of the data set, for messages and the report.
        loaded: Report of the loading, where there was one.
        notes: Lines for the user.
        rows_read: Rows that were given.
        format: Name of their format.
        columns: Column -> what is done with it.
        overlooked: Columns that hold a part of the conversation, and are not used.
        findings: What else a user should know before trusting the run.
        bad_before: Bad rows found before tokenising, by reason.
        first: Place and problem of the first row that was left out before tokenising.
    """

    dataset: Dataset
    options: DataOptions
    name: str
    loaded: LoadReport | None
    notes: list[str]
    rows_read: int
    format: str = "tokenised"
    columns: dict[str, str] = field(default_factory=dict)
    overlooked: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    bad_before: dict[str, int] = field(default_factory=dict)
    first: str = ""

    @classmethod
    def begin(cls, dataset: Any, options: DataOptions, name: str) -> Stages:
        """A data set that can be gone through.

        Raises:
            DataError: No rows, or not a data set.
        """
        loaded = load_report(dataset)
        rows, notes = batches.materialise(with_class_names(dataset), name)
        before = [*loaded.notes, *notes] if loaded else notes
        return cls(rows, options, name, loaded, before, len(rows), first=loaded.first if loaded else "")

    def read_as(self, spec: FormatSpec, *, for_sft: bool = False) -> None:
        """Note the format of the rows, and what is done with their columns."""
        self.format = spec.name
        if self.loaded is not None:
            # The columns of the source, not those that loading made of them.
            self.columns, self.overlooked = dict(self.loaded.columns), list(self.loaded.overlooked)
            self.findings += self.loaded.findings
            return
        self.columns = column_uses(spec, self.dataset.column_names, for_sft=for_sft)
        table = from_dataset(self.name, self.dataset)
        first = table.first()
        self.overlooked = overlooked(spec, self.columns, first)
        self.findings += look(spec, self.columns, first, f"{self.name} data set", lambda: (row for _, row in table))

    def became(self, dataset: Dataset, bad: Mapping[str, int], notes: Sequence[str], first: str = "") -> None:
        """Go on with other rows, such as pairs that were made of the given ones."""
        self.dataset, self.bad_before = dataset, dict(bad)
        self.notes += notes
        self.first = self.first or first

    @property
    def num_read(self) -> int:
        """Rows found at the source; ranked rows may have become several."""
        return max(self.rows_read, len(self.dataset)) + (self.loaded.num_lost if self.loaded else 0)

    @property
    def _earlier(self) -> Mapping[str, int]:
        return self.loaded.bad_rows if self.loaded else {}

    def check(self, tally: Tally, also_lost: Mapping[str, int] | None = None) -> None:
        """Refuse to go on after losing too much.

        Args:
            tally: Sums over the rows.
            also_lost: Rows that an earlier tally counted, by reason.

        Raises:
            DataError: More than ``max_dropped_share`` of the rows was lost, or no row is left.
        """
        lost = sum_counts(self._earlier, left_out(self.bad_before, self.options.on_bad_rows), also_lost or {})
        batches.check_share(tally, self.num_read, lost, self.options.max_dropped_share, self.name, self.first)

    def report(
        self, result: Dataset, tally: Tally, lengths: Mapping[str, Any], tokens: tuple[int, int, int]
    ) -> PrepareReport:
        """The report on the prepared data set.

        Args:
            result: The prepared rows.
            tally: Sums over the rows.
            lengths: Lengths in tokens by part.
            tokens: Prompt, chosen and rejected tokens.
        """
        return build_report(
            name=self.name,
            format_name=self.format,
            rows_read=self.num_read,
            rows_kept=len(result),
            tally=tally,
            bad_rows=sum_counts(self.bad_before, tally.bad, self._earlier),
            options=self.options,
            notes=self.notes,
            lengths=lengths,
            tokens=tokens,
            columns=self.columns,
            overlooked=self.overlooked,
            findings=self.findings,
            ranges={column: range_of(column, result) for column in ("weight", "margin")},
            say=str if self.loaded else in_python,
        )
