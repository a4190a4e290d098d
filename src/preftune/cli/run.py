"""``preftune run``: from a file of rows and a model to a judged model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from preftune.config import CommandLine, split_command_line
from preftune.config.own import take_own
from preftune.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from preftune.data.audit import AuditReport
    from preftune.pipeline import Pipeline
    from preftune.pipeline.choices import Settled

_HELP = """usage: preftune run DATA --model MODEL [--out DIR] [--name value ...]

The whole path: look the data over, hold some out, choose settings, train, evaluate on what was held out, and write a
report. DATA is a file of rows, a folder, or a name on the Hub; pairs are trained with DPO, labelled answers with KTO,
conversations with supervised fine-tuning. Every chosen setting is shown with its reason and written to
DIR/run.yaml. Any setting of the training verb can be given as a flag or in a --config file, and takes precedence.

example: preftune run pairs.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --out tuned

Ctrl-C stops; the same command goes on. --dry_run stops before training and leaves nothing behind.

{flags}

All other settings are those of the training verbs: see `preftune dpo --help`."""

#: Settings that the choice is shown of; the file has all.
_SHOWN_FIRST = ("beta", "learning_rate", "num_train_epochs", "test_split_size", "use_peft", "max_length")


@dataclass
class _Own:
    """Flags of this verb alone.

    Attributes:
        model: Model to tune: Hub id or folder; the same as --model_name_or_path.
        out: Folder for everything that the run leaves; the same as --output_dir.
        verb: Training verb, such as dpo; found from the rows and from loss_type by default.
        audit: Look the data over first; --no_audit leaves it out.
        evaluate: Evaluate on the held-out rows in the end; --no_evaluate leaves it out.
        num_prompts: Prompts that answers are drawn for in the evaluation; 0 draws none.
        max_new_tokens: Longest such answer, in tokens.
    """

    model: str | None = None
    out: str | None = None
    verb: str | None = None
    audit: bool = True
    evaluate: bool = True
    num_prompts: int = 16
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        for name, least in (("num_prompts", 0), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                value = getattr(self, name)
                raise ConfigError("out of range", where=f"--{name}", value=value, allowed=f"{least} or more")


def main(argv: Sequence[str]) -> int:
    """Run the verb."""
    data, rest = _data(argv)
    line = split_command_line(rest)
    if line.help:
        print(help_text())
        return 0
    own, line = take_own(line, _Own)
    line = _with(line, dataset_name=data, model_name_or_path=own.model, output_dir=own.out)
    from rich.console import Console

    from preftune.cli.console import plain_warnings

    console = Console()
    with plain_warnings(console):
        from preftune.pipeline import Asked, Pipeline

        asked = Asked(line, own.verb, own.audit, own.evaluate, own.num_prompts, own.max_new_tokens)
        pipeline = Pipeline(asked, tuple(argv), console)
        try:
            return _all(pipeline, console)
        except KeyboardInterrupt:
            _say(console, f"to go on: {pipeline.command}")
            raise


def help_text() -> str:
    """The help of the verb."""
    from preftune.cli.help import own_lines
    from preftune.terminal.wrapping import wrapped

    return wrapped(_HELP.format(flags="\n".join(own_lines(_Own))))


def _data(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The data, which may stand first, and everything else."""
    if argv and not argv[0].startswith("-") and not argv[0].endswith((".yaml", ".yml")):
        return argv[0], list(argv[1:])
    return None, list(argv)


def _with(line: CommandLine, **given: str | None) -> CommandLine:
    """The line with settings that were given under short names."""
    flags = list(line.flags)
    short = {"dataset_name": "DATA", "model_name_or_path": "--model", "output_dir": "--out"}
    for name, value in given.items():
        if value is None:
            continue
        twice = next((flag for each, _, flag in line.flags if each == name), None)
        if twice is not None:
            raise ConfigError(f"both {short[name]} and {twice} are given", where="command line", remedy="keep one")
        flags.append((name, (value,), short[name]))
    return CommandLine(line.configs, tuple(flags), line.help)


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _heading(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold cyan", markup=False, highlight=False)


def _all(pipeline: Pipeline, console: Console) -> int:
    from transformers.utils.logging import disable_progress_bar

    from preftune.runs import next_steps
    from preftune.runs.failures import foreseen

    # Bars for files that are read in a blink bury those that tell something.
    disable_progress_bar()
    with console.status("looking at the data"):
        pipeline.begin()
    with foreseen(pipeline.settings.trainer), tempfile.TemporaryDirectory() as scratch:
        code = _settings_and_training(pipeline, console, Path(scratch))
        if code or pipeline.dry:
            if pipeline.dry:
                words = next_steps.without_flag(pipeline.argv, "dry_run")
                _say(console, f"next: {next_steps.command('run', *words)}")
            return code
        _evaluation(pipeline, console)
    _heading(console, "report")
    path = pipeline.report()
    _say(console, _verdict(pipeline.folder))
    _say(console, f"wrote {path}")
    _say(console, f"next: {next_steps.chat(pipeline.folder)}\n      {next_steps.export(pipeline.folder)}")
    return 0


def _settings_and_training(pipeline: Pipeline, console: Console, scratch: Path) -> int:
    from preftune.cli.train import run_training
    from preftune.runs.run import Run
    from preftune.runs.settings import read_settings

    if pipeline.begun:
        path = pipeline.folder / "run.yaml"
        _say(console, f"going on in {pipeline.folder}, with the settings of {path}")
    else:
        report = pipeline.audit()
        if report is not None:
            _heading(console, "data")
            _audit(report, pipeline, console)
        with console.status("choosing settings"):
            settled, _ = pipeline.settle()
        assert settled is not None
        path = pipeline.write(settled, scratch if pipeline.dry else None)
        _heading(console, "settings")
        _chosen(settled, console)
        if not pipeline.dry:
            _say(console, f"all of them, with reasons: {path}", "dim")
    if pipeline.trained and not pipeline.dry:
        return 0
    _heading(console, "training")
    argv = pipeline.training(path)
    settings = read_settings(pipeline.verb, argv)
    this = Run(pipeline.verb, tuple(argv), settings, console, again=pipeline.command)
    return run_training(this)


def _audit(report: AuditReport, pipeline: Pipeline, console: Console) -> None:
    """A line on the data, and one for each finding that needs attention."""
    from preftune.terminal.units import plural

    counts = [(one, sum(each.severity == one for each in report.findings)) for one in ("problem", "warn", "note")]
    found = ", ".join(plural(number, "warning" if one == "warn" else one) for one, number in counts if number)
    head = f"{report.dataset}: {plural(report.num_rows, 'usable row')} to train on"
    head += f", {pipeline.num_held_out:,} held out" if pipeline.num_held_out else ""
    _say(console, f"{head}; {found or 'nothing found'}")
    styles = {"problem": "bold red", "warn": "yellow"}
    for each in report.findings:
        if each.severity in styles:
            _say(console, f"{each.severity}: {each.title}", styles[each.severity])
    if found and not pipeline.dry:
        _say(console, f"details: {pipeline.folder / 'audit.json'}, and in the report", "dim")


def _chosen(settled: Settled, console: Console) -> None:
    """The chosen settings with their reasons, one line each, the first ones in full view."""
    order = {name: number for number, name in enumerate(_SHOWN_FIRST)}
    choices = sorted(settled.choices, key=lambda one: order.get(one.name, len(order)))
    values = [_shown(choice.value) for choice in choices]
    first = max((len(choice.name) for choice in choices), default=0) + 2
    second = max(map(len, values), default=0) + 2
    for choice, value in zip(choices, values, strict=True):
        why = shorten(choice.why, max(console.width - first - second, 20), placeholder=" ...")
        _say(console, f"{choice.name:<{first}}{value:<{second}}{why}")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _evaluation(pipeline: Pipeline, console: Console) -> None:
    from preftune.evaluation.table import show

    if not pipeline.asked.evaluate or pipeline.evaluated:
        return
    _heading(console, "evaluation")
    why = pipeline.evaluate(lambda result: show(result, console))
    if why is not None:
        _say(console, f"not evaluated: {why}", "yellow")


def _verdict(folder: Path) -> str:
    """The first sentence of the report."""
    from preftune.report.verdict import headline

    return headline(folder)
