"""What preparation did to a data set, for the user, the summary panel and the provenance file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from preftune.data.rows import NEUTRAL, shorten
from preftune.data.unused_columns import told_of
from preftune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from preftune.data.batches import Tally
    from preftune.data.options import DataOptions

_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True)
class PrepareReport:
    """Counts of one prepared data set.

    Attributes:
        name: Name of the data set, for example ``train``.
        format: Data format, or ``tokenised`` for a data set that was prepared before.
        rows_read: Rows found at the source.
        rows_kept: Rows to train on. Ranked rows may become several.
        dropped: Rows without anything to learn from after truncation, by reason.
        bad_rows: Bad rows by reason: left out with ``skip``, trained on with ``warn``.
        num_truncated: Kept rows that lost tokens.
        merged_share: Share of tokenised rows whose tokens merge across the prompt boundary, or whose prompt renders
            differently alone.
        merged_example: The end of one such prompt that the training sequence does not contain.
        num_doubled_bos_fixed: Rows a second beginning-of-sequence token was removed from.
        num_eos_missing: Rows with a completion that lacks an end-of-sequence token of its own accord.
        num_eos_appended: Of these, rows it was appended to.
        num_prompt_tokens: Prompt tokens of all kept rows, a shared prompt counted once. SFT: tokens not trained on.
        num_chosen_tokens: Tokens of chosen completions. SFT: tokens trained on.
        num_rejected_tokens: Tokens of rejected completions. SFT: 0.
        lengths: Mean, quantiles and maximum of the lengths in tokens, by part.
        num_environment: Rows whose answers hold turns that the model does not write.
        num_transcripts: Rows of ``Human:``/``Assistant:`` transcripts, where the tokenizer has a chat template.
        num_marked: Rows with turns that are marked as not to be trained on (``weight: 0``, ``train: false``).
        num_repeated: Rows of text whose answers begin with their whole prompt.
        num_plain: Rows whose prompt is text and no transcript, where the tokenizer has a chat template.
        columns: Column of the data -> what is done with it.
        findings: What a user should know before trusting the run, one finding a line.
        warnings: The findings, after notes on what was done.
    """

    name: str
    format: str
    rows_read: int
    rows_kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    bad_rows: dict[str, int] = field(default_factory=dict)
    num_truncated: int = 0
    merged_share: float = 0.0
    merged_example: str | None = None
    num_doubled_bos_fixed: int = 0
    num_eos_missing: int = 0
    num_eos_appended: int = 0
    num_prompt_tokens: int = 0
    num_chosen_tokens: int = 0
    num_rejected_tokens: int = 0
    lengths: dict[str, dict[str, float]] = field(default_factory=dict)
    num_environment: int = 0
    num_transcripts: int = 0
    num_marked: int = 0
    num_repeated: int = 0
    num_plain: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    findings: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields as values that JSON can hold."""
        return {**asdict(self), "findings": list(self.findings), "warnings": list(self.warnings)}

    def lines(self) -> list[str]:
        """The report in words, one fact per line."""
        out = [f"{self.name}: {self.rows_kept} of {self.rows_read} rows ({self.format})"]
        if self.dropped:
            out.append(f"dropped after truncation: {shorten(self.dropped)}")
        if self.bad_rows:
            out.append(f"bad rows: {shorten(self.bad_rows)}")
        if self.num_truncated:
            out.append(f"truncated: {self.num_truncated}")
        return out + list(self.warnings)


def describe_lengths(columns: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Mean, quantiles and maximum of each column of lengths.

    Args:
        columns: Name -> array of lengths in tokens.

    Returns:
        Name -> statistic -> tokens.
    """
    import numpy as np

    out: dict[str, dict[str, float]] = {}
    for name, lengths in columns.items():
        if len(lengths) == 0:
            continue
        stats = {"mean": float(np.mean(lengths))}
        stats |= {key: float(np.quantile(lengths, q)) for key, q in _QUANTILES.items()}
        out[name] = {**stats, "max": float(np.max(lengths))}
    return out


def build_report(
    *,
    name: str,
    format_name: str,
    rows_read: int,
    rows_kept: int,
    tally: Tally,
    bad_rows: Mapping[str, int],
    options: DataOptions,
    notes: Sequence[str],
    lengths: Mapping[str, Any],
    tokens: tuple[int, int, int],
    columns: Mapping[str, str] | None = None,
    overlooked: Sequence[str] = (),
    findings: Sequence[str] = (),
    ranges: Mapping[str, tuple[float, float] | None] | None = None,
    say: Callable[[str], str] = str,
) -> PrepareReport:
    """The report of one prepared data set.

    Args:
        name: Name of the data set.
        format_name: Data format.
        rows_read: Rows found at the source.
        rows_kept: Rows to train on.
        tally: Sums over the rows.
        bad_rows: Bad rows by reason, those found while loading included.
        options: Data options.
        notes: Lines for the user from earlier stages.
        lengths: Lengths in tokens by part.
        tokens: Prompt, chosen and rejected tokens.
        columns: Column of the data -> what is done with it.
        overlooked: Columns that hold a part of the conversation, and are not used.
        findings: Findings of earlier stages.
        ranges: Least and greatest number of columns that change the loss; ``None`` for those that are not there.
        say: Puts findings into the words of whoever hears them.
    """
    report = PrepareReport(
        name=name,
        format=format_name,
        rows_read=rows_read,
        rows_kept=rows_kept,
        bad_rows=dict(bad_rows),
        num_prompt_tokens=tokens[0],
        num_chosen_tokens=tokens[1],
        num_rejected_tokens=tokens[2],
        lengths=describe_lengths(lengths),
        columns=dict(columns or {}),
        **_of_tally(tally),
    )
    more, of_turns = _of_turns(report, options)
    about, told = _of_columns(report.columns, overlooked, ranges or {})
    found = tuple(map(say, (*_of_rows(report, options), *of_turns, *told, *findings)))
    report = replace(report, findings=found, warnings=(*notes, *more, *about, *_appended(report), *found))
    if options.warn:
        warn_findings(report)
    return report


def _of_tally(tally: Tally) -> dict[str, Any]:
    """Fields of a report that are sums over the rows."""
    return {
        "dropped": dict(tally.dropped),
        "num_truncated": tally.num_truncated,
        "merged_share": tally.num_merged / max(1, tally.num_tokenised),
        "merged_example": tally.example,
        "num_doubled_bos_fixed": tally.num_doubled_bos,
        "num_eos_missing": tally.num_eos_missing,
        "num_eos_appended": tally.num_eos_appended,
        "num_environment": tally.num_environment,
        "num_transcripts": tally.num_transcripts,
        "num_marked": tally.num_marked,
        "num_repeated": tally.num_repeated,
        "num_plain": tally.num_plain,
    }


class DataWarning(UserWarning):
    """Something about the data that a user should know; one warning for each finding."""


def findings(report: PrepareReport) -> list[str]:
    """What was found in a data set that a user should know before trusting the run, one finding a line."""
    return [f"{report.name} data set: {line}" for line in report.findings]


def warn_findings(report: PrepareReport, stacklevel: int = 2) -> None:
    """Say each finding as a Python warning.

    Args:
        report: The report of one prepared data set.
        stacklevel: As in :func:`warnings.warn`, counted from the caller.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    for line in findings(report):
        warnings.warn(line, DataWarning, stacklevel=stacklevel + 1)


def _of_turns(report: PrepareReport, options: DataOptions) -> tuple[list[str], list[str]]:
    """Notes on what was done with turns and transcripts, and findings about them."""
    notes, found = [], []
    if report.num_environment:
        rows = f"answers of {report.num_environment} rows hold turns that the model does not write (tools, users)"
        if options.environment_turns == "masked":
            notes.append(f"{rows}: they are not scored")
        else:
            found.append(
                f"{rows}: they are scored as its own words, as in TRL; environment_turns: masked leaves them out"
            )
    if report.num_marked:
        found.append(
            f"{report.num_marked} rows mark turns as not to be trained on (weight: 0, train: false, loss: false): the"
            " marks are not read, as in TRL; make the answers to learn completions of their own"
        )
    if 2 * report.num_repeated > report.rows_read:
        found.append(
            f"answers of {report.num_repeated} rows begin with their whole prompt, which is trained on as a part of the"
            " answer, as in TRL: remove it from the answers, or leave the prompt's column out"
            " (`dataset_columns: [chosen, rejected]`)"
        )
    if report.num_transcripts:
        if options.transcripts == "messages":
            notes.append(f"{report.num_transcripts} transcripts (Human: ... Assistant: ...) were made conversations")
        else:
            found.append(
                f"{report.num_transcripts} rows are transcripts (Human: ... Assistant: ...) and are trained on as text,"
                " as in TRL, which is not how the tokenizer's chat template presents a conversation;"
                " transcripts: messages renders them with it"
            )
    if report.num_plain:
        if options.plain_text == "messages":
            notes.append(f"{report.num_plain} rows of plain text were made conversations of a question and its answer")
        else:
            found.append(
                f"{report.num_plain} rows are plain text, which the model is trained on as it is, as in TRL; in a chat"
                " it is asked with its tokenizer's chat template. plain_text: messages makes questions and answers of"
                " these rows and renders them with it"
            )
    return notes, found


def _of_columns(
    columns: Mapping[str, str], overlooked: Sequence[str], ranges: Mapping[str, tuple[float, float] | None]
) -> tuple[list[str], list[str]]:
    """Notes on columns that change the loss by their name alone, and findings about them and about unused ones."""
    notes, found = [], []
    weights, margins = ranges.get("weight"), ranges.get("margin")
    if weights is not None and weights != (1.0, 1.0):
        found.append(
            f"the column 'weight' scales the loss of each row, from {weights[0]:g} to {weights[1]:g}; rename or remove"
            " it if it means something else"
        )
    if margins is not None:
        notes.append(
            f"score gaps of the pairs are from {margins[0]:g} to {margins[1]:g}; losses that want one use them"
        )
    given = [name for name in ("ref_chosen_logps", "ref_rejected_logps") if name in columns]
    if given:
        notes.append(f"{' and '.join(given)} are left aside: the reference is computed anew")
    return notes, [*found, *told_of(overlooked, columns)]


def range_of(column: str, dataset: Dataset) -> tuple[float, float] | None:
    """Least and greatest number of a column; ``None`` where there is no such column."""
    import pyarrow.compute as pc

    if column not in dataset.column_names or not len(dataset):
        return None
    found = pc.min_max(dataset.data.table[column]).as_py()
    return float(found["min"]), float(found["max"])


def check_weights(dataset: Dataset, name: str) -> tuple[float, float] | None:
    """The range of the rows' weights, if they have any.

    Raises:
        DataError: All are 0, so that nothing would be trained.
    """
    found = range_of("weight", dataset)
    if found == (0.0, 0.0):
        raise DataError(
            "every row has the weight 0, so that nothing would be trained",
            where=f"{name} data set, field 'weight'",
            remedy="rename the column, remove it, or give weights above 0",
        )
    return found


def _appended(report: PrepareReport) -> list[str]:
    if not report.num_eos_appended:
        return []
    return [f"the end-of-sequence token was appended to completions of {report.num_eos_appended} rows"]


def _of_rows(report: PrepareReport, options: DataOptions) -> list[str]:
    """What became of rows on their way."""
    out = []
    bad = {reason: count for reason, count in report.bad_rows.items() if reason not in NEUTRAL}
    if bad:
        skipped = options.on_bad_rows == "skip"
        where = f", see {options.quarantine_path}" if options.quarantine_path else ""
        fate = "left out" if skipped else "kept, as TRL would"
        out.append(f"{sum(bad.values())} bad rows {fate}: {shorten(bad)}{where}")
    ties = sum(report.bad_rows.values()) - sum(bad.values())
    if ties:
        out.append(f"{ties} ties left out: neither answer is preferred")
    if report.dropped:
        out.append(
            f"{sum(report.dropped.values())} of {report.rows_read} rows dropped, with nothing left to learn from:"
            f" {shorten(report.dropped)}"
        )
    if report.merged_share > 0:
        out.append(
            f"in {report.merged_share:.1%} of the rows the prompt alone is tokenised differently from the prompt with"
            f" its answer; the completion starts where they part, which leaves out {report.merged_example!r}. End"
            " prompts on a token boundary, or use a template that renders both alike"
        )
    if report.num_doubled_bos_fixed:
        out.append(f"{report.num_doubled_bos_fixed} rows began with two beginning-of-sequence tokens; one was removed")
    if report.num_eos_missing and not report.num_eos_appended:
        out.append(
            f"{report.num_eos_missing} rows have a completion without the end-of-sequence token: the model does not"
            " learn to stop there. Use a template that writes it, or append_eos"
        )
    return out
