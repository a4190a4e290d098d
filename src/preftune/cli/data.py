"""``preftune data show``: rows as the trainer sees them, token by token."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from preftune.config import CommandLine, Resolved, split_command_line
from preftune.config.own import take_own
from preftune.errors import ConfigError, DataError
from preftune.verbs import ROWS

if TYPE_CHECKING:
    from rich.console import Console

    from preftune.data import LoadReport

ACTIONS = ("show", "audit", "convert", "select")
VERBS = tuple(ROWS)
_HELP = """usage: preftune data show --dataset_name D --model_name_or_path M [--config FILE.yaml] [--name value ...]

Print prepared rows: prompt, chosen, rejected; which tokens are trained on, and which truncation drops.

{flags}

`preftune data audit --help` is about what is wrong with a data set, `preftune data convert --help` about writing it
in another form, `preftune data select --help` about leaving pairs out that a model does not learn.

Settings of that verb that concern data, tokenizer and truncation count as they do there."""

_CONVERT_HELP = """usage: preftune data convert --dataset_name D --out FILE [--config FILE.yaml] [--name value ...]

Write a data set of any known format as TRL's columns: prompt, chosen, rejected; prompt, completion, label for
labelled answers (--verb {labelled}); messages, or prompt and completion, with --verb sft. Says what is done with every
column.

{flags}

Settings of that verb that concern reading count as they do there: dataset_columns, dataset_format, pairing,
on_bad_rows, transcripts (messages makes conversations of Human:/Assistant: transcripts, text leaves them), plain_text
(messages makes a question and its answer of other text)."""


@dataclass
class _OwnOfConvert:
    """Flags of ``convert`` alone.

    Attributes:
        out: File to write: .jsonl, .json or .parquet.
        verb: Read the rows as this verb would.
    """

    out: str = ""
    verb: str = field(default="dpo", metadata={"choices": VERBS})


@dataclass
class _Own:
    """Flags of this verb alone.

    Attributes:
        num_rows: How many rows to print.
        first_row: Number of the first one.
        verb: Prepare the rows as this verb would.
    """

    num_rows: int = 3
    first_row: int = 0
    verb: str = field(default="dpo", metadata={"choices": VERBS})

    def __post_init__(self) -> None:
        for name, least in (("num_rows", 1), ("first_row", 0)):
            if getattr(self, name) < least:
                allowed = f"{least} or more"
                raise ConfigError("out of range", where=f"--{name}", value=getattr(self, name), allowed=allowed)


def _help(action: str = "show") -> str:
    from preftune.cli.help import own_lines
    from preftune.terminal.wrapping import wrapped

    text, own = (_CONVERT_HELP, _OwnOfConvert) if action == "convert" else (_HELP, _Own)
    labelled = next(verb for verb, rows in ROWS.items() if rows == "labelled")
    return wrapped(text.format(flags="\n".join(own_lines(own)), labelled=labelled))


def main(argv: Sequence[str]) -> int:
    """Run the verb."""
    action = argv[0] if argv and not argv[0].startswith("-") else None
    if action is None and any(token in ("-h", "--help") for token in argv):
        print(_help())
        return 0
    if action not in ACTIONS:
        close = difflib.get_close_matches(action or "", ACTIONS, n=1)
        raise ConfigError(
            f"unknown action {action!r}" if action else "no action",
            where="preftune data",
            allowed=", ".join(ACTIONS),
            remedy=f"did you mean `preftune data {close[0]}`?" if close else None,
        )
    if action in ("audit", "select"):
        from preftune.cli import audit, select

        verb = audit.main if action == "audit" else select.main
        return verb(argv[1:])
    line = split_command_line(argv[1:])
    if line.help:
        print(_help(action))
        return 0
    (_convert if action == "convert" else _show)(line)
    return 0


def _convert(line: CommandLine) -> None:
    from rich.console import Console

    from preftune.cli.console import plain_warnings
    from preftune.data import DataOptions, export, load_report
    from preftune.runs.data import dataset_names, load_splits
    from preftune.runs.network import go_offline_if_unreachable
    from preftune.runs.settings import read_settings

    own, rest = take_own(line, _OwnOfConvert)
    if not own.out:
        raise ConfigError("no file to write to", where="--out", allowed=", ".join(export.SUFFIXES))
    target = export.check_target(own.out)
    console = Console()
    with plain_warnings(console):
        settings = read_settings(own.verb, rest)
        settings.script.require_dataset()
        offline = go_offline_if_unreachable(dataset_names(settings.script))
        rows = load_splits(settings, with_test=False)["train"]
        report = load_report(rows)
        _check_kind(own.verb, rows, report)
        config = settings.trainer
        options = DataOptions(transcripts=config.transcripts, plain_text=config.plain_text)
        number = export.write(rows, target, options)
    told = [offline] if offline else []
    if report is not None:
        told.append(f"format: {', '.join(dict.fromkeys(report.formats.values()))}")
        told += [*_about(report), *report.notes]
    told += [
        f"wrote {number} rows to {target}: {', '.join(rows.column_names)}",
        _next(settings, str(target), own.verb),
    ]
    for text in told:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _next(settings: Resolved[Any], target: str, verb: str) -> str:
    from preftune.runs.next_steps import command

    words = ["--dataset_name", target, "--verb", verb, "--model_name_or_path"]
    model = settings.model.model_name_or_path
    if model is None:
        return f"a model's view of them: {command('data', 'show', *words)} MODEL"
    return f"next: {command('data', 'show', *words, model)}"


def _check_kind(verb: str, rows: Any, report: Any) -> None:
    """Refuse to write rows that the verb could not learn from.

    Raises:
        DataError: They hold no pairs or no labels.
    """
    wanted = {"pairs": ("chosen", "rejected"), "labelled": ("completion", "label"), "sft": ()}[ROWS[verb]]
    if wanted and not set(wanted) <= set(rows.column_names) and not {"chosen", "rejected"} <= set(rows.column_names):
        raise DataError(
            f"preftune {verb} learns from {'pairs' if ROWS[verb] == 'pairs' else 'labelled answers'}, and the rows are "
            f"examples of one answer ({', '.join(dict.fromkeys(report.formats.values()))})",
            where="--verb",
            value=verb,
            remedy="set --verb sft, or name the columns of the answers with `dataset_columns: {theirs: ours}`",
        )


def _about(report: LoadReport) -> list[str]:
    """What was done with columns, and what was left out."""
    from preftune.data.export import columns_told
    from preftune.data.rows import shorten

    told = columns_told(report.columns)
    if report.overlooked:
        told.append(f"not used, although they hold a part of the conversation: {', '.join(report.overlooked)}")
    told += report.findings
    if report.bad_rows:
        told.append(f"left out: {shorten(report.bad_rows)}; the first is {report.first}")
    return told


def _show(line: CommandLine) -> None:
    from rich.console import Console

    from preftune.cli.console import plain_warnings

    own, rest = take_own(line, _Own)
    console = Console()
    with plain_warnings(console):
        from preftune.runs.settings import read_settings

        # Bad rows are what somebody may be looking for, so that they do not end the verb here.
        _print_rows(console, read_settings(own.verb, rest, on_bad_rows="warn"), own)


def _rows_to_show(settings: Resolved[Any]) -> Any:
    """The rows, bad ones included where they can be shown at all; otherwise without those, as a run would train."""
    from preftune.runs.data import load_splits

    try:
        return load_splits(settings, with_test=False)["train"]
    except DataError:
        if settings.trainer.on_bad_rows != "warn":
            raise
        settings.trainer.on_bad_rows = "skip"
        return load_splits(settings, with_test=False)["train"]


def _print_rows(console: Console, settings: Resolved[Any], own: _Own) -> None:
    from preftune.data import load_report, show
    from preftune.data.token_view import ENCLOSING, REMARKS
    from preftune.models.loading import load_tokenizer
    from preftune.runs.data import dataset_names
    from preftune.runs.network import go_offline_if_unreachable
    from preftune.training.setup import data_options, use_template_and_eos

    settings.script.require_dataset()
    args, verb = settings.trainer, own.verb
    offline = go_offline_if_unreachable([*dataset_names(settings.script), settings.model.require_model()])
    if offline:
        console.print(offline, style="yellow", highlight=False)
    extra = {name: getattr(args, name) for name in ("max_prompt_length", "implicit_prompt") if verb != "sft"}
    kinds = {name: getattr(args, name) for name in ("completion_only_loss", "assistant_only_loss") if verb == "sft"}
    tokenizer = load_tokenizer(settings.model)
    if verb == "sft":
        use_template_and_eos(tokenizer, args.chat_template_path, args.eos_token)
    if verb in REMARKS:
        console.print(REMARKS[verb], highlight=False)
    rows = _rows_to_show(settings)
    report = load_report(rows)
    for text in _about(report) if report is not None else []:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    show(
        rows,
        tokenizer,
        data_options(args, enclose=verb in ENCLOSING, **extra),
        num_rows=own.num_rows,
        start=own.first_row,
        kind=ROWS[verb],
        console=console,
        **kinds,
    )
