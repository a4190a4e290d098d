"""``preftune sweep``: search over settings with trials that share model, tokens and reference values."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from preftune.cli.failures import plain_warnings
from preftune.cli.main import INTERRUPTED
from preftune.config import CommandLine, redact, split_command_line
from preftune.errors import ConfigError, PreftuneError, SetupError
from preftune.sweep.plan import Plan

VERBS = ("dpo", "orpo", "cpo")
SEARCHES, PRUNERS, KEEPS = ("grid", "random", "tpe"), ("none", "median", "halving"), ("best", "all", "none")
_STORAGE_VARIABLE = "PREFTUNE_SWEEP_STORAGE"
_SWITCHES = frozenset({"retrain_best", "retry_failed", "dry_run"})


@dataclass
class Options:
    """Flags of the sweep itself; all others are settings of the trials.

    Attributes:
        param: A field and its values, ``beta=0.05,0.1,0.2``, or a range, ``learning_rate=1e-6..1e-4:log``; once per
            field. By default the method's own 3x3 grid of beta and learning rate.
        out: Folder of the sweep. Naming the folder of an earlier one goes on with it, or joins it.
        verb: Training verb of the trials: dpo, orpo or cpo.
        search: grid, random or tpe; by default grid where all values are listed, else tpe.
        num_trials: Number of trials of random and tpe; 20 by default.
        workers: Processes on this machine that share the trials.
        storage: Database URL of the study, such as postgresql://...; by default a journal file in the folder.
        ray: Run the trials on a Ray cluster: its address, or local to start one here. --workers is then the number of
            trials at a time.
        eval_share: Share of the prompts to hold out; by default a test split, or a tenth where there is none.
        metric: Which figure decides. Where rewards are log-ratios to a reference, by default
            eval_rewards/margins_per_token if trials are sampled, eval_preference_gain if not, or if the search or a
            pruner goes by it on the way; else eval_rewards/accuracies.
        pruner: Stop trials whose held-out metric falls behind: none, median or halving. Needs eval_strategy.
        diverge_factor: A loss this many times the first one, twice in a row, ends a trial as diverged (heuristic).
        num_samples: Sample each trial on this many held-out prompts, to see how far it has moved and whether it has
            left what the reference writes; 100 by default where there is a reference, 0 for none.
        keep: Whose weights are kept: best, all or none.
        fuse: Train up to this many LoRA trials in one forward over the shared base; each ends where it ends alone. What
            is searched must then be settings of the loss or of the optimizer, such as beta and learning_rate.
        retrain_best: Train the sweet spot once more, into OUT/best.
        retry_failed: Run failed trials of an earlier call once more.
        dry_run: Show the trials, and stop.
        as_worker: For the processes that --workers starts.
    """

    param: list[str] = dataclasses.field(default_factory=list)
    out: str | None = None
    verb: str = "dpo"
    search: str | None = None
    num_trials: int | None = None
    workers: int = 1
    storage: str | None = None
    ray: str | None = None
    eval_share: float | None = None
    metric: str | None = None
    pruner: str = "none"
    diverge_factor: float = 10.0
    num_samples: int | None = None
    keep: str = "best"
    fuse: int = 1
    retrain_best: bool = False
    retry_failed: bool = False
    dry_run: bool = False
    as_worker: bool = False
    #: Names of the flags that were given.
    named: frozenset[str] = dataclasses.field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        """Check the values that do not depend on the trials."""
        for name, allowed in (("verb", VERBS), ("search", SEARCHES), ("pruner", PRUNERS), ("keep", KEEPS)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                remedy = "sft and kto have no held-out pairs to compare" if value in ("sft", "kto") else None
                raise ConfigError(
                    "unknown value", where=f"--{name}", value=value, allowed=", ".join(allowed), remedy=remedy
                )
        for name, least in (("workers", 1), ("num_trials", 1), ("num_samples", 0), ("fuse", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError("out of range", where=f"--{name}", value=value, allowed=f"{least} or more")
        if self.num_samples == 1:
            raise ConfigError("one prompt has no interval", where="--num_samples", value=1, allowed="0, or 2 or more")
        if self.diverge_factor <= 1:
            raise ConfigError("out of range", where="--diverge_factor", value=self.diverge_factor, allowed="above 1")
        if self.eval_share is not None and not 0 < self.eval_share < 1:
            raise ConfigError(
                "not a share", where="--eval_share", value=self.eval_share, allowed="more than 0, less than 1"
            )


def main(argv: Sequence[str]) -> int:
    """Run the verb.

    Args:
        argv: Arguments after the verb.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        PreftuneError: Any foreseen failure.
    """
    line = split_command_line(argv)
    if line.help:
        print(help_text())
        return 0
    options, rest = read_options(line)
    if options.out is None:
        raise ConfigError("no folder for the sweep", where="--out", remedy="set --out DIR")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SetupError(
            "a sweep's trials run in one process each",
            where="WORLD_SIZE",
            value=os.environ["WORLD_SIZE"],
            remedy="start it without torchrun or accelerate launch, with --workers N",
        )
    console = Console()
    folder = Path(options.out)
    with plain_warnings(console), _quiet_libraries():
        if options.as_worker:
            return _as_worker(folder)
        return _sweep(options, rest, folder, console)


def help_text() -> str:
    """The help of the verb, from the attributes of :class:`Options`."""
    from preftune.cli.help import field_lines
    from preftune.config.fields import fields_of

    lines = [
        "usage: preftune sweep --config FILE.yaml --param beta=0.05,0.1,0.2 --param learning_rate=1e-6,1e-5 --out DIR",
        "       preftune sweep --out DIR          go on with a sweep, or join it from another machine",
        "",
        "Trials of preftune dpo, orpo or cpo over any of their settings; see `preftune dpo --help` for those.",
        "",
    ]
    shown = (field for name, field in fields_of(Options).items() if name != "as_worker")
    return "\n".join([*lines, *(line for field in shown for line in field_lines(field))])


def read_options(line: CommandLine) -> tuple[Options, CommandLine]:
    """Tell the sweep's flags from the trials' settings.

    Raises:
        ConfigError: A value does not fit its flag.
    """
    from preftune.config.coerce import Mismatch, coerce
    from preftune.config.fields import describe, fields_of

    own = fields_of(Options)
    given: dict[str, Any] = {}
    rest = []
    for name, values, flag in line.flags:
        if name in own and not values and name not in _SWITCHES and name != "as_worker":
            raise ConfigError("needs a value", where=flag, remedy=f"write {flag} VALUE")
        if name == "param":
            given.setdefault("param", []).extend(values)
        elif name in own:
            text = " ".join(values) if values else "true"
            try:
                given[name] = coerce(text, own[name].annotation, text=True)
            except Mismatch as why:
                allowed = describe(own[name].annotation)
                raise ConfigError(why.why, where=flag, value=redact(text), allowed=allowed, remedy=why.remedy) from why
        else:
            rest.append((name, values, flag))
    options = Options(**{"storage": os.environ.get(_STORAGE_VARIABLE), **given})
    options.named = frozenset(given)
    return options, CommandLine(line.configs, tuple(rest))


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """The sweep gives its own account; bars of single trials would bury it."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    bars, own = are_progress_bars_disabled(), is_progress_bar_enabled()
    disable_progress_bars()
    disable_progress_bar()
    try:
        yield
    finally:
        if not bars:
            enable_progress_bars()
        if own:
            enable_progress_bar()


# ---- running -------------------------------------------------------------------------------------------------------


def _sweep(options: Options, rest: CommandLine, folder: Path, console: Console) -> int:
    from preftune.cli.sweep_plan import begin
    from preftune.cli.sweep_view import summary
    from preftune.sweep.board import Board

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
        _run_trials(options, plan, folder, board, console, num_done)
    except KeyboardInterrupt:
        _how_to_go_on(options, console)
        return INTERRUPTED
    return _end(options, plan, folder, board, console)


def _run_trials(options: Options, plan: Plan, folder: Path, board: Any, console: Console, num_done: int) -> None:
    from preftune.cli.sweep_trial import runner_of
    from preftune.cli.sweep_view import View
    from preftune.sweep.result import drop_weights
    from preftune.sweep.work import work

    class Tidying(View):
        def finished(self, trial: Any, outcome: Any) -> None:
            super().finished(trial, outcome)
            drop_weights(plan, board.states(), folder, final=False)

    with Tidying(plan, console, num_done, options.workers) as view:
        view.already(board)
        if options.ray is not None:
            from preftune.sweep.ray_tune import run_on_ray

            factory = "preftune.cli.sweep_trial:runner_of"
            run_on_ray(plan, folder, options.ray, options.workers, board, view, factory)
        elif options.workers > 1 and not board.is_done():
            _with_workers(options, plan, folder, board, view)
        # Whatever a worker left behind when it died is done here.
        work(board, runner_of(plan, folder), folder, reporter=view)


def _with_workers(options: Options, plan: Plan, folder: Path, board: Any, view: Any) -> None:
    """Start workers, show what they do, and wait for them."""
    import time

    from preftune.sweep.children import Children

    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "preftune", "sweep", "--out", str(folder), "--as_worker"],
            env=_environment(number, options.workers, plan.storage),
        )
        for number in range(options.workers)
    ]
    children = Children(processes)
    try:
        while any(process.poll() is None for process in processes):
            view.waiting(board)
            for line in (*board.tend(), *children.end_hung(board.hung)):
                view.note(line)
            time.sleep(0.5)
    except KeyboardInterrupt:
        # The terminal has told them too: each gives its trial back.
        children.wait()
        raise
    finally:
        children.end()
    view.waiting(board)


def _environment(number: int, workers: int, storage: str | None) -> dict[str, str]:
    """One accelerator per worker where there are several, else its share of the processor."""
    import torch

    found = dict(os.environ)
    if storage is not None:
        # On the command line everybody on the machine could read a password.
        found[_STORAGE_VARIABLE] = storage
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_devices > 1:
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = named.split(",") if named else [str(device) for device in range(num_devices)]
        found["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    elif not num_devices:
        found.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // workers)))
    return found


def _as_worker(folder: Path) -> int:
    from preftune.cli.sweep_plan import nothing_begun
    from preftune.cli.sweep_trial import runner_of
    from preftune.sweep.board import Board
    from preftune.sweep.plan import read_plan
    from preftune.sweep.result import drop_weights
    from preftune.sweep.work import Reporter, work

    begun = read_plan(folder)
    if begun is None:
        raise nothing_begun(folder)
    plan = dataclasses.replace(begun, storage=os.environ.get(_STORAGE_VARIABLE) or begun.storage)
    board = Board(plan, folder)

    class Tidying(Reporter):
        def finished(self, trial: Any, outcome: Any) -> None:
            drop_weights(plan, board.states(), folder, final=False)

    try:
        work(board, runner_of(plan, folder), folder, reporter=Tidying(), wait=False)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


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


def _end(options: Options, plan: Plan, folder: Path, board: Any, console: Console) -> int:
    from preftune.cli.sweep_view import table
    from preftune.ownership import RunFolder
    from preftune.sweep.holdout import KIND
    from preftune.sweep.locks import beginning
    from preftune.sweep.result import drop_weights, write_result

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
    for line in (*_closing(result, plan, folder), _report(folder)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if options.retrain_best:
        return retrain(plan, folder)
    return 0


def _closing(result: Mapping[str, Any], plan: Plan, folder: Path) -> list[str]:
    best, scored, passes = result["best"], result["reference_pairs"], result["reference_passes"]
    times = "pass" if passes == 1 else "passes"
    return [
        best["reason"],
        f"reference: {scored:,} pairs scored, {passes:g} {times} over the data for all trials together",
        f"saved {folder / 'sweep.json'}",
        f"to train the sweet spot: preftune {plan.verb} --config {shlex.quote(str(folder / best['config']))}",
    ]


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
    from preftune.cli.training import run
    from preftune.sweep.result import BEST_NAME

    return run(plan.verb, ["--config", str(folder / BEST_NAME), "--existing_output", "set_aside_own"])


__all__ = ["Options", "help_text", "main", "read_options", "retrain"]
