"""``preftune data show`` and ``data convert``: rows as the trainer sees them, and rows as TRL's columns."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from preftune.config import CommandLine, Resolved, resolve, split_command_line
from preftune.config.coerce import Mismatch, coerce
from preftune.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

ACTIONS = ("show", "audit", "convert")
VERBS = ("dpo", "orpo", "cpo", "kto", "sft")
_OWN: dict[str, Any] = {"num_rows": 3, "first_row": 0, "verb": "dpo"}

_HELP = """usage: preftune data show --dataset_name D --model_name_or_path M [--config FILE.yaml] [--name value ...]

Print prepared rows: prompt, chosen, rejected; which tokens are trained on, and which truncation drops.

  --num_rows   an integer  [3]
      How many rows to print.
  --first_row  an integer  [0]
      Number of the first one.
  --verb       dpo, orpo, cpo, kto, sft  [dpo]
      Prepare the rows as this verb would.

`preftune data audit --help` is about what is wrong with a data set, `preftune data convert --help` about writing it
in another form.

Settings of that verb that concern data, tokenizer and truncation count as they do there."""

_CONVERT_HELP = """usage: preftune data convert --dataset_name D --out FILE [--config FILE.yaml] [--name value ...]

Write a data set of any known format as TRL's columns: prompt, chosen, rejected; prompt, completion, label with --verb
kto; messages, or prompt and completion, with --verb sft. Says what is done with every column.

  --out   a file
      .jsonl, .json or .parquet.
  --verb  dpo, orpo, cpo, kto, sft  [dpo]
      Read the rows as this verb would.

Settings of that verb that concern reading count as they do there: dataset_columns, dataset_format, pairing,
on_bad_rows, transcripts (messages makes conversations of Human:/Assistant: transcripts, text leaves them)."""


def main(argv: Sequence[str]) -> int:
    """Run the verb.

    Args:
        argv: Arguments after the verb.

    Returns:
        0.

    Raises:
        PreftuneError: Wrong settings, or data that cannot be prepared.
    """
    action = argv[0] if argv and not argv[0].startswith("-") else None
    if action is None and any(token in ("-h", "--help") for token in argv):
        print(_HELP)
        return 0
    if action not in ACTIONS:
        close = difflib.get_close_matches(action or "", ACTIONS, n=1)
        raise ConfigError(
            f"unknown action {action!r}" if action else "no action",
            where="preftune data",
            allowed=", ".join(ACTIONS),
            remedy=f"did you mean `preftune data {close[0]}`?" if close else None,
        )
    if action == "audit":
        from preftune.cli import audit

        return audit.main(argv[1:])
    line = split_command_line(argv[1:])
    if line.help:
        print(_HELP if action == "show" else _CONVERT_HELP)
        return 0
    if action == "convert":
        _convert(line)
    else:
        _show(line)
    return 0


def _convert(line: CommandLine) -> None:
    from rich.console import Console

    from preftune.cli.failures import plain_warnings
    from preftune.cli.network import go_offline_if_unreachable
    from preftune.cli.training import cli_defaults, complete_pairing, dataset_names, load_splits, settings_classes
    from preftune.data import export, load_report

    own, rest = _own_settings(line, {"out": "", "verb": "dpo"})
    if not own["out"]:
        raise ConfigError("no file to write to", where="--out", allowed=", ".join(export.SUFFIXES))
    target = export.check_target(own["out"])
    console = Console()
    with plain_warnings(console):
        settings = resolve(rest, settings_classes(own["verb"])[0], defaults=cli_defaults())
        complete_pairing(own["verb"], settings)
        settings.script.require_dataset()
        offline = go_offline_if_unreachable(dataset_names(settings.script))
        rows = load_splits(settings, with_test=False)["train"]
        report = load_report(rows)
        number = export.write(rows, target, as_messages=settings.trainer.transcripts == "messages")
    told = [offline] if offline else []
    if report is not None:
        told.append(f"format: {', '.join(dict.fromkeys(report.formats.values()))}")
        told += export.columns_told(report.columns)
        left_out = ", ".join(f"{count} {reason}" for reason, count in report.bad_rows.items())
        told += [*report.notes, *([f"left out: {left_out}"] if left_out else [])]
    told += [
        f"wrote {number} rows to {target}: {', '.join(rows.column_names)}",
        f"next: preftune data show --dataset_name {target} --verb {own['verb']} --model_name_or_path MODEL",
    ]
    for text in told:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _show(line: CommandLine) -> None:
    from rich.console import Console

    from preftune.cli.failures import plain_warnings
    from preftune.cli.training import cli_defaults, complete_pairing, settings_classes

    own, rest = _own_settings(line, _OWN)
    console = Console()
    with plain_warnings(console):
        # Bad rows are what somebody may be looking for, so that they do not end the verb here.
        defaults = cli_defaults() | {"on_bad_rows": "warn"}
        settings = resolve(rest, settings_classes(own["verb"])[0], defaults=defaults)
        complete_pairing(own["verb"], settings)
        _print_rows(console, settings, own)


def _own_settings(line: CommandLine, defaults: Mapping[str, Any]) -> tuple[dict[str, Any], CommandLine]:
    """Take out the flags that only this verb has."""
    own = dict(defaults)
    kept = []
    for name, values, shown in line.flags:
        if name not in own:
            kept.append((name, values, shown))
            continue
        kind = type(defaults[name])
        try:
            own[name] = coerce(values[0] if len(values) == 1 else list(values), kind, text=True)
        except Mismatch as reason:
            raise ConfigError(reason.why, where=shown, value=" ".join(values)) from reason
    if own["verb"] not in VERBS:
        raise ConfigError("not an allowed value", where="--verb", value=own["verb"], allowed=", ".join(VERBS))
    for name, least in (("num_rows", 1), ("first_row", 0)):
        if name in own and own[name] < least:
            raise ConfigError("out of range", where=f"--{name}", value=own[name], allowed=f"{least} or more")
    return own, replace(line, flags=tuple(kept))


def _print_rows(console: Console, settings: Resolved[Any], own: dict[str, Any]) -> None:
    from preftune.cli.network import go_offline_if_unreachable
    from preftune.cli.training import dataset_names, load_splits
    from preftune.data import load_report, show
    from preftune.data.export import columns_told
    from preftune.data.view import ENCLOSING, REMARKS
    from preftune.data.view import VERBS as KINDS
    from preftune.models.loading import load_tokenizer
    from preftune.training.setup import data_options, use_template_and_eos

    settings.script.require_dataset()
    args, verb = settings.trainer, own["verb"]
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
    rows = load_splits(settings, with_test=False)["train"]
    report = load_report(rows)
    for text in columns_told(report.columns) if report is not None else []:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    show(
        rows,
        tokenizer,
        data_options(args, enclose=verb in ENCLOSING, **extra),
        num_rows=own["num_rows"],
        start=own["first_row"],
        kind=KINDS[verb],
        console=console,
        **kinds,
    )
