"""``preftune sweep``: search over settings with trials that share model, tokens and reference values."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.config import CommandLine, redact, split_command_line
from preftune.errors import ConfigError, PreftuneError, SetupError
from preftune.sweep.options import Options, read_options

if TYPE_CHECKING:
    from rich.console import Console

    from preftune.sweep.board import Board
    from preftune.sweep.plan import Plan


def main(argv: Sequence[str]) -> int:
    """Run the verb."""
    line = split_command_line(argv)
    if line.help:
        print(help_text())
        return 0
    options, rest = read_options(line)
    if options.out is None:
        raise ConfigError("no folder for the sweep", where="--out", remedy="set --out DIR")
    from rich.console import Console

    from preftune.bars import hidden_bars
    from preftune.cli.console import plain_warnings
    from preftune.cli.verbs import INTERRUPTED

    console = Console()
    folder = Path(options.out)
    # The sweep gives its own account; bars of single trials would bury it.
    with plain_warnings(console), hidden_bars():
        if not options.as_worker:
            return _sweep(options, rest, folder, console)
        from preftune.sweep.run import run_worker

        try:
            run_worker(folder)
        except KeyboardInterrupt:
            return INTERRUPTED
        return 0


def help_text() -> str:
    """The help of the verb, from the attributes of :class:`Options`."""
    from preftune.cli.help import own_lines
    from preftune.terminal.wrapping import wrapped

    lines = [
        "usage: preftune sweep --config FILE.yaml --param beta=0.05,0.1,0.2 --param learning_rate=1e-6,1e-5 --out DIR",
        "       preftune sweep --out DIR          go on with a sweep, or join it from another machine",
        "",
        "Trials of preftune dpo, orpo or cpo over any of their settings; see `preftune dpo --help` for those.",
        "",
    ]
    return wrapped("\n".join([*lines, *own_lines(Options, without=("as_worker",))]))


def _sweep(options: Options, rest: CommandLine, folder: Path, console: Console) -> int:
    from preftune.cli.verbs import INTERRUPTED
    from preftune.sweep.board import Board
    from preftune.sweep.run import run_trials
    from preftune.sweep.setup import begin
    from preftune.sweep.view import View, summary

    plan, notes = begin(options, rest, folder)
    if options.dry_run:
        console.print(summary(plan, 0, notes))
        console.print("dry run: nothing was trained", highlight=False)
        return 0
    board = Board(plan, folder)
    board.tend(options.retry_failed)
    num_done = sum(state.outcome is not None for state in board.states())
    console.print(summary(plan, num_done, notes))
    try:
        with View(plan, console, num_done, options.workers) as view:
            view.already(board)
            run_trials(plan, folder, board, view, workers=options.workers, ray=options.ray)
    except KeyboardInterrupt:
        _how_to_go_on(options, console)
        return INTERRUPTED
    return _end(options, plan, folder, board, console)


def _how_to_go_on(options: Options, console: Console) -> None:
    words = ["preftune", "sweep", "--out", str(options.out)]
    if options.workers > 1:
        words += ["--workers", str(options.workers)]
    if options.ray is not None:
        words += ["--ray", options.ray]
    if options.storage is not None and redact(options.storage) == options.storage:
        words += ["--storage", options.storage]
    words += ["--retrain_best"] if options.retrain_best else []
    text = f"stopped; finished trials are kept\nto go on: {shlex.join(words)}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _end(options: Options, plan: Plan, folder: Path, board: Board, console: Console) -> int:
    from preftune.ownership import RunFolder
    from preftune.sweep.holdout import KIND
    from preftune.sweep.locks import beginning
    from preftune.sweep.result import drop_weights, write_result
    from preftune.sweep.view import table

    states = board.states()
    with beginning(folder):
        RunFolder.open(folder, KIND)
        result = write_result(plan, states, folder)
    drop_weights(plan, states, folder, final=True)
    console.print(table(result))
    if result["best"] is None:
        reasons = dict.fromkeys(trial["reason"] for trial in result["trials"] if trial["reason"])
        raise SetupError(
            f"no trial was completed ({'; '.join(reasons)[:300]})",
            where=str(folder),
            remedy="correct the cause, then preftune sweep --out DIR --retry_failed",
        )
    closing = [*_closing(result, plan, folder), _report(folder)]
    closing += [] if options.retrain_best else [_next(result, plan, folder)]
    for line in closing:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return retrain(plan, folder) if options.retrain_best else 0


def _closing(result: Mapping[str, Any], plan: Plan, folder: Path) -> list[str]:
    best, scored, passes = result["best"], result["reference_pairs"], result["reference_passes"]
    times = "pass" if passes == 1 else "passes"
    return [
        best["reason"],
        f"reference: {scored:,} pairs scored, {passes:g} {times} over the data for all trials together",
        f"saved {folder / 'sweep.json'}",
    ]


def _next(result: Mapping[str, Any], plan: Plan, folder: Path) -> str:
    """The command that trains the sweet spot, unless the sweet spot prefers the rejected answers itself."""
    from preftune.runs.next_steps import command
    from preftune.sweep.scores import GAIN, MARGIN, PER_TOKEN

    best, metric = result["best"], result["metric"]
    chosen: Mapping[str, Any] = next((each for each in result["trials"] if each["number"] == best["number"]), {})
    mean = ((chosen.get("metrics") or {}).get(metric) or {}).get("mean")
    if metric in (GAIN, MARGIN, PER_TOKEN) and mean is not None and mean < 0:
        told = f"even the sweet spot prefers the rejected answers ({metric.removeprefix('eval_')} {mean:.3g})"
        return f"{told}: look at the data before anything is trained\nnext: {command('report', folder)}"
    return f"to train the sweet spot\nnext: {command(plan.verb, '--config', folder / best['config'])}"


def _report(folder: Path) -> str:
    """Write the page with the maps. A sweep that is done must not fail because of a page."""
    from preftune.ownership import RunFolder
    from preftune.report import build
    from preftune.sweep.holdout import KIND
    from preftune.sweep.locks import beginning

    try:
        with beginning(folder):
            run = RunFolder.open(folder, KIND)
            if not run.may_put("report.html"):
                return f"{folder / 'report.html'} was not written by this sweep and is left as it is"
            path = build([folder], folder / "report.html")
            run.note([path.name])
        return f"wrote {path}"
    except PreftuneError as error:
        return f"the report could not be written: {error}"


def retrain(plan: Plan, folder: Path) -> int:
    """Train the sweet spot once more, through its verb."""
    from preftune.cli import train
    from preftune.sweep.result import BEST_NAME

    return train.main(plan.verb, ["--config", str(folder / BEST_NAME), "--existing_output", "set_aside_own"])
