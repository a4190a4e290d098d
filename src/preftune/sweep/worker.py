"""A worker's loop: claim, run, enter the outcome; and wait for what other workers still hold."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from preftune.ownership.paths import move_aside
from preftune.sweep.board import Board, Claim
from preftune.sweep.liveness import BEAT_SECONDS
from preftune.sweep.runner import Outcome, TrialRunner, TrialSpec

#: Folder in a sweep's for run folders of trials whose process died.
GIVEN_UP = "given-up"
#: How often a worker that has nothing to do looks again.
POLL_SECONDS = 1.0


class Reporter:
    """Shown what happens; the command line draws bars and lines, the default is silent."""

    def started(self, trial: TrialSpec) -> None:
        """A trial begins here."""

    def step(self, trial: TrialSpec, step: int, num_steps: int) -> None:
        """An optimizer step of it is done."""

    def finished(self, trial: TrialSpec, outcome: Outcome) -> None:
        """A trial ends here."""

    def note(self, text: str) -> None:
        """A line for the user."""

    def waiting(self, board: Board) -> None:
        """Nothing to do at present: other workers hold what is left."""


class _Attending:
    """The observer of claimed trials: signs of life in the background, pruning through the study."""

    def __init__(self, board: Board, claims: list[Claim], specs: list[TrialSpec], reporter: Reporter) -> None:
        self._board, self._reporter = board, reporter
        self._claims = {spec.number: claim for spec, claim in zip(specs, claims, strict=True)}
        self._steps = {spec.number: (0, 0) for spec in specs}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beats, daemon=True)

    def __enter__(self) -> _Attending:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _beats(self) -> None:
        count = 0
        while True:
            for number, claim in self._claims.items():
                step, num_steps = self._steps[number]
                self._board.beat(claim, {"step": step, "num_steps": num_steps, "count": count})
            count += 1
            if self._done.wait(BEAT_SECONDS):
                return

    def step(self, trial: TrialSpec, step: int, num_steps: int) -> None:
        """Remember how far a trial is."""
        self._steps[trial.number] = (step, num_steps)
        self._reporter.step(trial, step, num_steps)

    def should_prune(self, trial: TrialSpec, step: int, metrics: dict[str, float]) -> str:
        """Ask the study's pruner."""
        plan = self._board.plan
        if plan.pruner == "none" or plan.metric not in metrics:
            return ""
        value = metrics[plan.metric]
        if not self._board.report(self._claims[trial.number], value, step):
            return ""
        return f"{plan.metric} of {value:.4g} at step {step} is behind other trials at that step ({plan.pruner} pruner)"


def work(
    board: Board,
    runner: TrialRunner,
    folder: Path,
    *,
    reporter: Reporter | None = None,
    tidy: Callable[[], None] = lambda: None,
    wait: bool = True,
    most: int | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Run trials until none is left.

    Args:
        board: The study.
        runner: Runs the trials.
        folder: The sweep's folder.
        reporter: Told what happens.
        tidy: Called after each trial.
        wait: Stay until the trials of other workers are done too, and take over from those that die.
        most: Stop after this many trials.
        sleep: Waits between two looks.

    Returns:
        Number of trials run here.
    """
    reporter = reporter or Reporter()
    num_run = 0
    while most is None or num_run < most:
        for line in board.tend():
            reporter.note(line)
        claims = board.claim(runner.max_trials)
        if claims:
            num_run += _run(board, runner, folder, claims, reporter, tidy)
            continue
        if not wait or board.is_done():
            break
        reporter.waiting(board)
        sleep(POLL_SECONDS)
    return num_run


def run_folder(folder: Path, claim: Claim) -> Path:
    """Where a trial's files go.

    A presumed-dead worker on another machine may come back to life, so that its successor gets a folder of its own.
    """
    name = f"{claim.slot:03d}" + (f"-{claim.attempt}" if claim.fresh_folder else "")
    return folder / "trials" / name


def begin_folder(folder: Path, run: Path) -> None:
    """Make the folder of a trial; what an earlier attempt or anybody else has left under its name is moved away.

    Args:
        folder: The sweep's folder; the old one goes into ``given-up`` in it.
        run: The trial's folder.
    """
    move_aside(run, folder / GIVEN_UP)
    run.mkdir(parents=True)


def _run(
    board: Board,
    runner: TrialRunner,
    folder: Path,
    claims: list[Claim],
    reporter: Reporter,
    tidy: Callable[[], None],
) -> int:
    specs = [TrialSpec(claim.slot, claim.params, run_folder(folder, claim)) for claim in claims]
    with board.released_on_error(claims) as finished:
        known = {claim.slot: board.known(claim) for claim in claims}
        new = [(claim, spec) for claim, spec in zip(claims, specs, strict=True) if known[claim.slot] is None]
        outcomes: dict[int, Outcome] = {number: outcome for number, outcome in known.items() if outcome is not None}
        if new:
            for _, spec in new:
                reporter.started(spec)
            with _Attending(board, [claim for claim, _ in new], [spec for _, spec in new], reporter) as observer:
                for (_, spec), outcome in zip(new, runner.run([spec for _, spec in new], observer), strict=True):
                    outcome.run = spec.folder.relative_to(folder).as_posix()
                    outcomes[spec.number] = outcome
        for claim, spec in zip(claims, specs, strict=True):
            outcome = outcomes[claim.slot]
            if not board.finish(claim, outcome):
                reporter.note(
                    f"trial {claim.slot} had been given up as dead; another worker has it, and its result counts"
                )
            finished(claim)
            reporter.finished(spec, outcome)
            tidy()
    return len(claims)
