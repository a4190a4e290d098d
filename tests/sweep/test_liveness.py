"""Telling dead workers from live ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from preftune.sweep.liveness import Watcher, identity, runs_here


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_this_process_lives() -> None:
    assert runs_here(identity()) is True


def test_a_killed_process_is_dead_at_once() -> None:
    code = "import json, time; from preftune.sweep.liveness import identity; print(json.dumps(identity()), flush=True)"
    child = subprocess.Popen([sys.executable, "-c", f"{code}; time.sleep(60)"], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        import json

        owner = json.loads(child.stdout.readline())
        assert runs_here(owner) is True
    finally:
        os.kill(child.pid, signal.SIGKILL)
    # Not yet waited for: a zombie works on nothing.
    child.wait(timeout=10) if runs_here(owner) else None
    assert runs_here(owner) is False
    child.wait(timeout=10)
    assert child.stdout.close() is None
    assert Watcher().is_dead(0, owner, None)


def test_a_process_number_that_came_round_again_is_another_process() -> None:
    owner = identity()
    assert runs_here({**owner, "born": owner["born"] - 100}) is False


def test_a_distant_worker_is_dead_when_its_sign_of_life_stands_still() -> None:
    clock = Clock()
    watcher = Watcher(patience=90, clock=clock)
    owner = {**identity(), "machine": "another"}
    assert runs_here(owner) is None
    for second in (0, 50, 89):
        clock.now = second
        assert not watcher.is_dead(3, owner, {"count": 1})
    clock.now = 89.5
    assert not watcher.is_dead(3, owner, {"count": 2})
    clock.now = 170
    assert not watcher.is_dead(3, owner, {"count": 2})
    clock.now = 180
    assert watcher.is_dead(3, owner, {"count": 2})


def test_an_owner_that_has_not_signed_yet_is_given_time() -> None:
    clock = Clock()
    watcher = Watcher(patience=90, clock=clock)
    assert not watcher.is_dead(0, None, None)
    clock.now = 100
    assert watcher.is_dead(0, None, None)


def test_a_worker_here_that_shows_no_sign_of_life_is_given_up_in_the_end() -> None:
    clock = Clock()
    watcher = Watcher(clock=clock, patience_here=30)
    owner = identity()
    for second in range(0, 31, 10):
        clock.now = second
        assert not watcher.is_dead(0, owner, {"count": 1})
    clock.now = 40
    assert not watcher.is_dead(0, owner, {"count": 2})
    assert not watcher.hung
    for second in range(50, 71, 10):
        clock.now = second
        assert not watcher.is_dead(0, owner, {"count": 2})
    clock.now = 80
    assert watcher.is_dead(0, owner, {"count": 2})
    assert watcher.hung == {os.getpid()}


def test_time_in_which_nobody_looked_is_held_against_no_worker_here() -> None:
    """All processes of a terminal stopped and continued together: the worker has no turn before somebody looks."""
    clock = Clock()
    watcher = Watcher(clock=clock, patience_here=30)
    assert not watcher.is_dead(0, identity(), {"count": 1})
    clock.now = 3600
    assert not watcher.is_dead(0, identity(), {"count": 1})
