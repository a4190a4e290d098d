"""Rows of any format as the checks read them, and the bad ones among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from preftune.data.audit.text import flat
from preftune.data.convert import canonical_rows, convert_row, presented
from preftune.data.first_rows import look
from preftune.data.formats import FormatSpec, column_uses, resolve
from preftune.data.formats.base import BadRow, Row
from preftune.data.loader import load_report
from preftune.data.options import DataOptions
from preftune.data.rows import BadRowHandler
from preftune.data.script_words import in_python
from preftune.data.tables import from_dataset
from preftune.data.unused_columns import overlooked, told_of
from preftune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_TOKENISED = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass
class Rows:
    """Rows of one data set.

    Attributes:
        name: Name of the data set, for messages.
        kind: ``preference``, ``unpaired`` or ``sft``.
        format: Name of their format.
        numbers: Number of each row in the data set, the first 0. Ranked responses make several rows of one number.
        rows: Canonical rows.
        prompts: Prompt of each as text; empty where the format has none.
        answers: Answers of each as text: chosen and rejected, or one.
        num_read: Rows found at the source.
        bad: Bad rows: ``place`` and ``reason``.
        notes: Lines for the user.
        columns: Column of the data -> what is done with it.
        findings: What the first rows show that a user should know.
    """

    name: str
    kind: str
    format: str
    numbers: list[int] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    answers: list[tuple[str, ...]] = field(default_factory=list)
    num_read: int = 0
    bad: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    @property
    def paired(self) -> bool:
        """Whether each row is a preference between two answers."""
        return self.kind == "preference"

    @property
    def chosen(self) -> list[str]:
        """The first answer of each row."""
        return [answers[0] for answers in self.answers]

    @property
    def rejected(self) -> list[str]:
        """The second answer of each row; pairs alone have one."""
        return [answers[1] for answers in self.answers]

    def __len__(self) -> int:
        return len(self.rows)


class _Recorder(BadRowHandler):
    """Leaves bad rows out and remembers where they were."""

    def __init__(self, quarantine_path: str | None) -> None:
        super().__init__("skip", quarantine_path)
        self.found: list[dict[str, str]] = []

    def keep(self, bad: BadRow, place: str, row: Any, *, converted: bool = True) -> bool:
        """Note one bad row; it never stays."""
        self.found.append({"place": place, "reason": bad.reason})
        return super().keep(bad, place, row, converted=converted)


def read_rows(
    dataset: Any,
    options: DataOptions,
    *,
    name: str = "train",
    tokenizer: PreTrainedTokenizerBase | None = None,
    bad: Sequence[Mapping[str, str]] = (),
) -> Rows:
    """Rows of any format, made canonical.

    Args:
        dataset: ``datasets.Dataset``, or rows.
        options: Data options; format and prompt rule count, and bad rows are left out and counted whatever
            ``on_bad_rows`` says.
        name: Name of the data set.
        tokenizer: Writes out token ids of a data set that was prepared before.
        bad: Bad rows that loading left out: ``place`` and ``reason``.

    Returns:
        The rows.

    Raises:
        DataError: No rows, an unknown format, or token ids without a tokenizer.
    """
    from datasets import Dataset as HFDataset

    from preftune.data.batches import materialise

    if isinstance(dataset, list):
        dataset = HFDataset.from_list(dataset, on_mixed_types="use_json")
    loaded = load_report(dataset)
    dataset, notes = materialise(dataset, name)
    spec, dataset = _format(dataset, options, name, tokenizer)
    recorder = _Recorder(options.quarantine_path)
    kind = "preference" if spec.kind in ("ranked", "rated") else spec.kind
    out = Rows(name, kind, spec.name, notes=list(notes), columns=column_uses(spec, dataset.column_names))
    table = from_dataset(f"{name} data set", dataset)
    if loaded is not None:
        out.findings = [*told_of(loaded.overlooked, loaded.columns), *loaded.findings]
    else:
        first = table.first()
        found = look(spec, out.columns, first, table.name, lambda: (row for _, row in table))
        out.findings = [*map(in_python, (*told_of(overlooked(spec, out.columns, first), out.columns), *found))]
    then = _then(tokenizer, options)
    if spec.kind == "rated":
        pairs, more = canonical_rows(table, spec, recorder)
        out.notes += more
        for number, row in enumerate(pairs):
            _enter(out, number, then(row))
    else:
        for number, raw in enumerate(from_dataset(name, dataset)):
            for row in convert_row(raw[1], f"{name} data set, row {number}", spec, recorder, then=then):
                _enter(out, number, row)
    out.bad = [*map(dict, bad), *recorder.found]
    out.num_read = len(dataset)
    if loaded is not None:
        out.format = ", ".join(sorted(set(loaded.formats.values()))) or out.format
        out.num_read = max(loaded.rows_read, len(dataset) + loaded.num_lost)
        out.notes += loaded.notes
        out.columns = dict(loaded.columns) or out.columns
        known = len(out.bad) - len(recorder.found)
        if not known:
            # Only the counts are known where the caller kept no record of the places.
            out.bad += [{"place": "", "reason": reason} for reason, n in loaded.bad_rows.items() for _ in range(n)]
    return out


def _then(tokenizer: PreTrainedTokenizerBase | None, options: DataOptions) -> Callable[[Row], Row]:
    """Text as conversations, where training makes it that."""
    template = options.chat_template or (tokenizer.chat_template if tokenizer is not None else None)
    return (lambda row: row) if template is None else (lambda row: presented(row, options)[0])


def _format(
    dataset: Dataset, options: DataOptions, name: str, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[FormatSpec, Dataset]:
    """The format of the rows; token ids are written out first."""
    if all(column in dataset.column_names for column in _TOKENISED):
        if tokenizer is None:
            raise DataError(
                "the rows are token ids, and there is no tokenizer to read them with",
                where=f"{name} data set",
                value=dataset.column_names,
                remedy="give a tokenizer, or audit the data as they were before preparation",
            )
        decoded = {
            column: [
                str(text) for text in tokenizer.batch_decode(list(dataset[f"{column}_ids"]), skip_special_tokens=True)
            ]
            for column in ("prompt", "chosen", "rejected")
        }
        dataset = type(dataset).from_dict(decoded)
    example = from_dataset(name, dataset).example()
    columns = dataset.column_names
    where, rule = f"{name} data set", options.implicit_prompt
    return resolve(options.dataset_format, columns, example, where=where, implicit_prompt=rule), dataset


def _enter(out: Rows, number: int, row: Row) -> None:
    out.numbers.append(number)
    out.rows.append(row)
    if out.kind == "preference":
        out.prompts.append(flat(row["prompt"]))
        out.answers.append((flat(row["chosen"]), flat(row["rejected"])))
    elif "completion" in row:
        out.prompts.append(flat(row["prompt"]))
        out.answers.append((flat(row["completion"]),))
    elif "messages" in row:
        # What leads up to the last answer is its prompt.
        messages = row["messages"]
        last = max((i for i, one in enumerate(messages) if one.get("role") == "assistant"), default=len(messages) - 1)
        out.prompts.append(flat(messages[:last]) if last else "")
        out.answers.append((flat([messages[last]]),))
    else:
        out.prompts.append("")
        out.answers.append((row["text"],))
