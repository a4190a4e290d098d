"""Who gets which trial: several workers, dead workers, several studies of the same storage."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from preftune.errors import SetupError
from preftune.sweep import liveness, locks, runner
from preftune.sweep.board import MAX_DEATHS, Board, Claim
from preftune.sweep.runner import Outcome, TrialSpec
from preftune.sweep.scores import ACCURACY
from preftune.sweep.space import Dimension
from preftune.sweep.storage import JOURNAL_NAME, open_storage
from preftune.sweep.worker import run_folder, work
from tests.sweep.helpers import Noting, complete, make_plan, work_in

ROOT = Path(__file__).resolve().parents[2]


def storage_of(kind: str, folder: Path) -> str | None:
    return None if kind == "journal" else f"sqlite:///{folder / 'study.db'}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_three_processes_run_every_trial_once(kind: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    notes = tmp_path / "notes"
    arguments = (str(tmp_path), storage_of(kind, tmp_path), str(notes), 0.05)
    if kind == "sqlite":
        # Its tables are made by the first to come; the sweep's own verb opens the study before it starts workers.
        Board(make_plan(storage=arguments[1]), tmp_path)
    workers = [context.Process(target=work_in, args=arguments) for _ in range(3)]
    for each in workers:
        each.start()
    for each in workers:
        each.join(120)
    assert [each.exitcode for each in workers] == [0, 0, 0]
    assert Counter(Noting(notes).numbers()) == Counter(range(9))
    states = Board(make_plan(storage=arguments[1]), tmp_path).states()
    assert [state.state for state in states] == ["complete"] * 9


def test_doubles_that_two_processes_put_in_are_struck_out(tmp_path: Path) -> None:
    plan = make_plan()
    first, second = Board(plan, tmp_path), Board(plan, tmp_path)
    # As if both had looked before either had written.
    for board in (first, second):
        for slot in range(plan.num_trials):
            board._enqueue(slot, 0, {})
    noting = Noting(tmp_path / "notes")
    claimed = [board.claim()[0] for board in (first, second, first)]
    assert [claim.slot for claim in claimed] == [0, 1, 2]
    for board, claim in zip((first, second, first), claimed, strict=True):
        board.finish(claim, complete(0.5))
    work(second, noting, tmp_path)
    assert sorted(noting.numbers()) == list(range(3, 9))
    assert first.is_done()


def test_a_finished_trial_is_not_run_again_by_a_later_call(tmp_path: Path) -> None:
    plan, noting = make_plan(), Noting(tmp_path / "notes")
    assert work(Board(plan, tmp_path), noting, tmp_path, most=4) == 4
    assert work(Board(plan, tmp_path), noting, tmp_path) == 5
    assert work(Board(plan, tmp_path), noting, tmp_path) == 0
    assert noting.numbers() == list(range(9))


def test_a_trial_whose_process_was_killed_is_run_again_and_no_other(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    code = f"from tests.sweep.helpers import work_in; work_in({str(tmp_path)!r}, None, {str(notes)!r}, 0.4)"
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        while len(Noting(notes).numbers()) < 3:
            assert worker.poll() is None
            time.sleep(0.02)
    finally:
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
    before = Noting(notes).numbers()
    done = [state.slot for state in Board(make_plan(), tmp_path).states() if state.outcome is not None]
    assert set(done) == set(before[:-1])
    work(Board(make_plan(), tmp_path), Noting(notes), tmp_path)
    after = Noting(notes).numbers()[len(before) :]
    assert after == [before[-1], *range(len(before), 9)]


class Given:
    """Takes the owners it is told for dead."""

    def __init__(self, dead: set[int], hung: set[int] | None = None) -> None:
        self.dead, self.hung = dead, hung or set()

    def is_dead(self, trial: int, owner: Any, beat: Any) -> bool:
        return trial in self.dead


def claim_and_die(folder: Path) -> Claim:
    """A claim whose process will be taken for dead."""
    board = Board(make_plan(), folder)
    board.tend()
    return board.claim()[0]


def test_an_outcome_noted_before_death_stands(tmp_path: Path) -> None:
    claim = claim_and_die(tmp_path)
    claim.handle.set_user_attr("outcome", complete(0.7).to_json())
    board = Board(make_plan(), tmp_path, Given({claim.handle.number}))  # type: ignore[arg-type]
    assert board.tend() == []
    state = board.states()[0]
    assert state.state == "complete"
    assert state.outcome is not None
    assert state.outcome.metrics[ACCURACY]["mean"] == 0.7


def test_a_worker_that_was_given_up_and_comes_back_does_not_count(tmp_path: Path) -> None:
    slow = Board(make_plan(), tmp_path)
    slow.tend()
    claim = slow.claim()[0]
    fast = Board(make_plan(), tmp_path, Given({claim.handle.number}))  # type: ignore[arg-type]
    assert fast.tend() == ["trial 0 is run again: its process has died"]
    again = fast.claim()[0]
    assert (again.slot, again.attempt, again.params) == (0, 1, claim.params)
    assert not slow.finish(claim, complete(0.1))
    slow.beat(claim, {"step": 1})
    assert fast.finish(again, complete(0.9))
    outcome = slow.states()[0].outcome
    assert outcome is not None
    assert outcome.metrics[ACCURACY]["mean"] == 0.9


def test_a_trial_of_a_process_that_hangs_is_run_again_in_a_folder_of_its_own(tmp_path: Path) -> None:
    claim = claim_and_die(tmp_path)
    board = Board(make_plan(), tmp_path, Given({claim.handle.number}, {os.getpid()}))  # type: ignore[arg-type]
    assert board.tend() == [f"trial 0 is run again: its process ({os.getpid()}) is there and does nothing"]
    again = board.claim()[0]
    assert (again.slot, again.attempt, again.fresh_folder) == (0, 1, True)


def test_only_one_of_two_that_notice_a_death_runs_the_trial_again(tmp_path: Path) -> None:
    claim = claim_and_die(tmp_path)
    dead = Given({claim.handle.number})
    first = Board(make_plan(), tmp_path, dead)  # type: ignore[arg-type]
    second = Board(make_plan(), tmp_path, dead)  # type: ignore[arg-type]
    told = [*first.tend(), *second.tend()]
    assert len(told) == 1
    slots = [each.slot for board in (first, second) for each in board.claim(limit=20)]
    assert sorted(slots) == list(range(9))


def test_a_trial_that_kills_its_processes_is_given_up(tmp_path: Path) -> None:
    told: list[str] = []
    for _ in range(MAX_DEATHS):
        claim = claim_and_die(tmp_path)
        assert claim.slot == 0
        told += Board(make_plan(), tmp_path, Given({claim.handle.number})).tend()  # type: ignore[arg-type]
    assert "given up" in told[-1]
    state = Board(make_plan(), tmp_path).states()[0]
    assert state.state == "failed"
    assert Board(make_plan(), tmp_path).claim()[0].slot == 1
    board = Board(make_plan(), tmp_path)
    board.tend(retry_failed=True)
    assert 0 in [claim.slot for claim in board.claim(limit=20)]


def test_ctrl_c_gives_the_trial_back(tmp_path: Path) -> None:
    class Interrupted(Noting):
        def run(self, trials: Any, observer: Any) -> list[Outcome]:
            if len(self.numbers()) == 2:
                raise KeyboardInterrupt
            return super().run(trials, observer)

    noting = Interrupted(tmp_path / "notes")
    with pytest.raises(KeyboardInterrupt):
        work(Board(make_plan(), tmp_path), noting, tmp_path)
    assert [state.state for state in Board(make_plan(), tmp_path).states()] == ["complete"] * 2 + ["waiting"] * 7
    # Interruptions do not count as deaths, and nothing has to be waited for.
    work(Board(make_plan(), tmp_path), Noting(tmp_path / "notes"), tmp_path)
    assert sorted(noting.numbers()) == list(range(9))


def test_a_runner_may_take_several_trials_at_once(tmp_path: Path) -> None:
    class Several(Noting):
        max_trials = 4
        sizes: list[int] = []  # noqa: RUF012 - noted across calls

        def run(self, trials: Any, observer: Any) -> list[Outcome]:
            self.sizes.append(len(trials))
            return super().run(trials, observer)

    several = Several(tmp_path / "notes")
    assert work(Board(make_plan(), tmp_path), several, tmp_path) == 9
    assert several.sizes == [4, 4, 1]


def test_adaptive_search_proposes_from_history_and_repeats_itself(tmp_path: Path) -> None:
    dimensions = (Dimension("learning_rate", low=1e-6, high=1e-3, log=True),)
    plan = make_plan(dimensions=dimensions, cells=(), search="tpe", num_trials=40)

    class Peaked(Noting):
        def run(self, trials: Any, observer: Any) -> list[Outcome]:
            super().run(trials, observer)
            return [complete(1 - abs(math.log10(t.params["learning_rate"]) + 4) / 4) for t in trials]

    rates = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        board = Board(plan, tmp_path / name)
        work(board, Peaked(tmp_path / name / "notes"), tmp_path / name)
        rates.append([state.params["learning_rate"] for state in board.states()])
    assert rates[0] == rates[1]
    # The first ten are drawn at random; afterwards it looks where it was good, around 1e-4. Of random draws a tenth
    # would lie within 0.15 decades: 5 or more of 30 has a chance of 18 %, 9 or more one of 0.2 %.
    near = [abs(math.log10(float(rate or 1)) + 4) < 0.15 for rate in rates[0][10:]]
    assert sum(near) >= 9


def test_equal_settings_are_computed_once(tmp_path: Path) -> None:
    plan = make_plan(dimensions=(Dimension("lora_r", (8, 16)),), cells=(), search="tpe", num_trials=6)
    noting = Noting(tmp_path / "notes")
    board = Board(plan, tmp_path)
    work(board, noting, tmp_path)
    assert len(noting.numbers()) == 2
    states = board.states()
    copies = [state for state in states if state.outcome is not None and state.outcome.same_as is not None]
    assert len(copies) == 4
    for copy in copies:
        assert copy.outcome is not None
        assert copy.outcome.same_as is not None
        assert states[copy.outcome.same_as].params == copy.params


@pytest.mark.parametrize(
    ("state", "ends"),
    [(runner.DIVERGED, "PRUNED"), (runner.PRUNED, "PRUNED"), (runner.STOPPED, "PRUNED"), (runner.FAILED, "FAIL")],
)
def test_trials_that_end_early_are_done_with(state: str, ends: str, tmp_path: Path) -> None:
    board = Board(make_plan(), tmp_path)
    board.tend()
    claim = board.claim()[0]
    assert board.finish(claim, Outcome(state, "a reason"))
    again = Board(make_plan(), tmp_path)
    assert again._study.trials[claim.handle.number].state.name == ends
    outcome = again.states()[0].outcome
    assert outcome is not None
    assert (outcome.state, outcome.reason) == (state, "a reason")
    again.tend()
    assert again.claim()[0].slot == 1


def test_an_unusable_storage_is_told_in_one_line_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="--storage") as told:
        open_storage("nodialect://user:secret@host/name", tmp_path)
    assert "secret" not in str(told.value)
    assert "\n" not in str(told.value)


def test_a_successor_of_a_distant_worker_has_a_folder_of_its_own(tmp_path: Path) -> None:
    claim = claim_and_die(tmp_path)
    claim.handle.set_user_attr("owner", {**liveness.identity(), "machine": "another"})
    board = Board(make_plan(), tmp_path, Given({claim.handle.number}))  # type: ignore[arg-type]
    board.tend()
    again = board.claim()[0]
    assert run_folder(tmp_path, claim).name == "000"
    assert run_folder(tmp_path, again).name == "000-1"


def test_pruning_asks_the_study(tmp_path: Path) -> None:
    plan = make_plan(pruner="median")
    board = Board(plan, tmp_path)
    board.tend()

    class Evaluating(Noting):
        told: list[str] = []  # noqa: RUF012 - noted across calls

        def run(self, trials: Any, observer: Any) -> list[Outcome]:
            (trial,) = trials
            assert isinstance(trial, TrialSpec)
            # All are alike but the last, which is worse.
            value = 0.1 if trial.number == 8 else 0.6
            self.told.append(observer.should_prune(trial, 10, {ACCURACY: value}))
            return [complete(value)]

    evaluating = Evaluating(tmp_path / "notes")
    work(board, evaluating, tmp_path)
    assert evaluating.told[:8] == [""] * 8
    assert "behind other trials" in evaluating.told[8]
    assert JOURNAL_NAME in os.listdir(tmp_path)


_KILLED_WITH_THE_LOCK = """
import os, signal
from pathlib import Path
from preftune.sweep.storage import open_storage
storage = open_storage(None, Path("out"))
storage._backend._lock.acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""
_NEXT = """
from pathlib import Path
from preftune.sweep.board import Board
from tests.sweep.helpers import make_plan
print(Board(make_plan(), Path("out")).claim() is not None)
"""


def test_a_process_killed_while_it_writes_leaves_no_lock_behind(tmp_path: Path) -> None:
    """From a relative folder, as on the command line; Optuna's own lock waits for ever there."""
    (tmp_path / "out").mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}

    def run(code: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=tmp_path, env=environment, timeout=120, capture_output=True, text=True)

    assert run(_KILLED_WITH_THE_LOCK).returncode == -signal.SIGKILL
    after = run(_NEXT)
    assert (after.returncode, after.stdout.strip()) == (0, "True"), after.stderr


_STOPPED_WITH_THE_LOCK = """
import os, signal
from pathlib import Path
from preftune.sweep.locks import JournalLock
lock = JournalLock(Path("study.lock"))
lock.acquire()
os.kill(os.getpid(), signal.SIGSTOP)
lock.release()
"""


def test_a_process_stopped_while_it_writes_loses_the_lock(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", _STOPPED_WITH_THE_LOCK]
    with subprocess.Popen(command, cwd=tmp_path, env=environment) as holder:
        try:
            os.waitid(os.P_PID, holder.pid, os.WSTOPPED)
            lock = locks.JournalLock(tmp_path / "study.lock", grace=0.5)
            began = time.monotonic()
            assert lock.acquire()
            assert time.monotonic() - began > 0.4
            # Whoever wakes up gives back what is not the lock any more.
            holder.send_signal(signal.SIGCONT)
            assert holder.wait(60) == 0
            assert not locks.JournalLock(tmp_path / "study.lock")._try()
            lock.release()
        finally:
            holder.kill()


def test_a_lock_in_use_is_never_taken_away(tmp_path: Path) -> None:
    """Four threads pass it round for longer than the grace; each is alone while it has it."""
    inside, most, end = [0], [0], time.monotonic() + 2.0

    def pass_round() -> None:
        lock = locks.JournalLock(tmp_path / "study.lock", grace=0.5)
        while time.monotonic() < end:
            lock.acquire()
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.002)
            inside[0] -= 1
            lock.release()

    threads = [threading.Thread(target=pass_round) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1


def test_without_file_locks_an_old_link_can_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(locks, "has_locks", lambda path: False)
    lock = locks.journal_lock(Path("study.journal"))
    Path("study.journal").touch()
    assert lock.acquire()
    (link,) = [path for path in tmp_path.iterdir() if path.is_symlink()]
    # Its age is that of the journal, by which Optuna tells a lock that nobody holds any more.
    assert link.stat().st_mtime == Path("study.journal").stat().st_mtime
    lock.release()
    assert not link.is_symlink()
