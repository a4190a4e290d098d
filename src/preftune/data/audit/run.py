"""One audit from rows to report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from preftune.data.audit import answers, lengths, repeats, tokens
from preftune.data.audit.noise import estimate_noise
from preftune.data.audit.report import AuditReport, Finding
from preftune.data.audit.rows import Rows, read_rows
from preftune.data.audit.text import same_text
from preftune.data.options import DataOptions
from preftune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PAIRS_ONLY = ("contradictions", "circles", "near_contradictions", "length_bias", "layout_bias", "label_noise")
_TOKENS_ONLY = ("truncation", "boundary_merges", "doubled_bos", "missing_eos")
_TEST_ONLY = ("leaked_rows", "leaked_prompts", "near_leaked_prompts")
# Shorter loops draw no bar.
_MIN_BAR = 2_000


def audit(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    options: DataOptions | None = None,
    test: Any = None,
    ref_margins: Sequence[float] | Any = None,
    name: str = "train",
    bad_rows: Sequence[Mapping[str, str]] = (),
    seed: int = 42,
    show_progress: bool = True,
) -> AuditReport:
    """Look a data set over before anything is trained on it.

    Args:
        dataset: ``datasets.Dataset`` or a list of rows, of any format: preference pairs, labelled answers, or SFT data.
        tokenizer: Tokenizer of the model; without one, lengths are words, and truncation and template go unchecked.
        options: Data options of the planned training. Bad rows are left out and counted whatever ``on_bad_rows`` says,
            and ``num_proc`` has no effect.
        test: Test split to look for in the training data.
        ref_margins: As :func:`preftune.data.audit.noise.estimate_noise` takes them, one per usable row of ``dataset``.
        name: Name of the data set, for the report.
        bad_rows: ``place`` and ``reason`` of bad rows that loading left out.
        seed: Of folds, resampling and samples; the same seed gives the same report.
        show_progress: Draw bars over long loops.

    Raises:
        DataError: No usable rows, an unknown format, or reference margins that do not match the rows.
        SetupError: A library that the audit needs is missing.
    """
    start = time.perf_counter()
    options = options or DataOptions()
    rows = read_rows(dataset, options, name=name, tokenizer=tokenizer, bad=bad_rows)
    if not len(rows) and not rows.bad:
        raise DataError("no usable rows", where=name, remedy="check the file and the split")
    held_out = None if test is None else read_rows(test, options, name="test", tokenizer=tokenizer)
    given = None if ref_margins is None else len(np.atleast_1d(ref_margins))
    if given not in (None, len(rows)):
        what, allowed = "one reference margin per usable row is needed", f"{len(rows)}"
        raise DataError(what, where="ref_margins", value=given, allowed=allowed)
    this = _Audit(rows, held_out, tokenizer, options, seed, show_progress)
    this.run(ref_margins)
    return AuditReport(
        dataset=name,
        kind=rows.kind,
        format=rows.format,
        num_rows=len(rows),
        num_read=rows.num_read,
        num_prompts=len(set(map(same_text, rows.prompts))),
        findings=tuple(this.findings),
        not_applicable=this.skipped,
        lengths=this.lengths,
        noise=this.noise,
        settings={
            **asdict(options),
            "tokenizer": None if tokenizer is None else str(tokenizer.name_or_path),
            **{"reference": ref_margins is not None, "seed": seed, "notes": list(rows.notes)},
        },
        seconds=time.perf_counter() - start,
    )


class _Audit:
    """Findings of one audit as they come in."""

    def __init__(
        self,
        rows: Rows,
        test: Rows | None,
        tokenizer: PreTrainedTokenizerBase | None,
        options: DataOptions,
        seed: int,
        show_progress: bool,
    ) -> None:
        self.rows, self.test, self.tokenizer, self.options, self.seed = rows, test, tokenizer, options, seed
        self.show_progress = show_progress
        self.findings: list[Finding] = []
        self.skipped: dict[str, str] = {}
        self.lengths: dict[str, Any] = {}
        self.noise: dict[str, Any] = {}

    def progress(self, items: Iterable[Any], title: str) -> Iterable[Any]:
        """A bar over long loops."""
        from tqdm.auto import tqdm

        known = list(items)
        hidden = True if not self.show_progress or len(self.rows) < _MIN_BAR else None
        return tqdm(known, desc=title, disable=hidden, leave=False)

    def run(self, ref_margins: Any) -> None:
        """Make every check that applies."""
        rows = self.rows
        self.findings += answers.check_bad_rows(rows, self.options.max_dropped_share)
        if rows.columns:
            self.findings.append(answers.check_columns(rows))
        self.findings += answers.first_rows(rows)
        if not len(rows):
            return
        self._repeats()
        self._tokens_and_lengths()
        self.findings += tokens.check_marks(rows, self.tokenizer)
        self.findings.append(answers.check_refusals(rows))
        self.findings.append(answers.check_languages(rows, self.seed))
        self.findings += answers.check_trivial(rows)
        if rows.paired:
            self.findings += answers.check_layout(rows)
            finding, self.noise = estimate_noise(rows, ref_margins=ref_margins, seed=self.seed)
            self.findings.append(finding)
            return
        why = "the rows are single answers, not pairs" if rows.kind == "unpaired" else "the rows hold no preferences"
        self.skipped |= dict.fromkeys(_PAIRS_ONLY, why)

    def _repeats(self) -> None:
        self.findings += repeats.check_duplicates(self.rows)
        if self.rows.paired:
            self.findings += repeats.check_contradictions(self.rows)
        elif self.rows.kind == "unpaired":
            self.findings.append(repeats.check_labels(self.rows))
        self.findings += repeats.check_near_duplicates(self.rows, self.progress)
        if self.test is not None and len(self.test):
            self.findings += repeats.check_leakage(self.rows, self.test, self.progress)
        else:
            self.skipped |= dict.fromkeys(_TEST_ONLY, "there is no test split")

    def _tokens_and_lengths(self) -> None:
        rows, found = self.rows, None
        why = "needs a tokenizer: set --model_name_or_path"
        if self.tokenizer is not None:
            found, problem = tokens.tokenised_or_reason(rows, self.tokenizer, self.options, self.progress)
            why = problem or why
        if found is not None and not found.pairs:
            why = "the chat template fails on every row"
        if found is not None:
            self.findings += tokens.check_tokens(rows, found, self.options)
        if found is None or not found.pairs:
            if self.tokenizer is not None and found is None:
                self.findings.append(
                    Finding("tokens", "problem", "the rows cannot be tokenised", f"{why}.", source="counted")
                )
            self.skipped |= dict.fromkeys(_TOKENS_ONLY, why)
            self._lengths_in_words()
            return
        columns = {"prompt": [len(pair.prompt) for pair in found.pairs]}
        columns["chosen" if rows.paired else "completion"] = [len(pair.chosen) for pair in found.pairs]
        if rows.paired:
            columns["rejected"] = [len(pair.rejected) for pair in found.pairs]
        columns["sequence"] = [lengths.longest(pair) for pair in found.pairs]
        self._describe({key: np.array(values, dtype=np.float64) for key, values in columns.items()}, "tokens")
        finding, cut = lengths.check_truncation(rows, found.pairs, found.numbers, self.options)
        self.findings.append(finding)
        self.lengths |= {"truncation": cut, "max_length_to_keep": cut["max_length_to_keep"]}

    def _lengths_in_words(self) -> None:
        rows = self.rows
        prompt, first = lengths.word_lengths(rows.prompts), lengths.word_lengths(rows.chosen)
        if not rows.paired:
            self._describe({"prompt": prompt, "completion": first, "sequence": prompt + first}, "words")
            return
        second = lengths.word_lengths(rows.rejected)
        columns = {
            "prompt": prompt,
            "chosen": first,
            "rejected": second,
            "sequence": prompt + np.maximum(first, second),
        }
        self._describe(columns, "words")

    def _describe(self, columns: Mapping[str, Any], unit: str) -> None:
        self.lengths = lengths.describe(columns, unit)
        if self.rows.paired:
            bias = lengths.check_length_bias(self.rows, columns["chosen"], columns["rejected"], unit)
            self.findings.append(bias)
