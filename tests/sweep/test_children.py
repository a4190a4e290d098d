"""Worker processes that hang are ended, and nothing else is."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from preftune.sweep import children
from preftune.sweep.children import Children
from preftune.sweep.liveness import Stillness, is_stopped

Process = subprocess.Popen[bytes]


@pytest.fixture
def sleepers() -> Iterator[list[Process]]:
    code = "import time; print('up', flush=True); time.sleep(120)"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline()
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def stop(process: Process) -> None:
    process.send_signal(signal.SIGSTOP)
    while not is_stopped(process.pid):
        time.sleep(0.01)


def test_a_stopped_worker_is_ended_after_a_while(sleepers: list[Process]) -> None:
    now = [0.0]
    stop(sleepers[0])
    watched = Children(sleepers, patience=15, still=Stillness(lambda: now[0]))
    for now[0] in (0.0, 10.0):
        assert watched.end_hung(()) == []
    now[0] = 20.0
    (line,) = watched.end_hung(())
    assert str(sleepers[0].pid) in line
    assert sleepers[0].returncode == -signal.SIGKILL
    assert sleepers[1].poll() is None


def test_one_that_was_continued_in_time_is_left_alone(sleepers: list[Process]) -> None:
    now = [0.0]
    watched = Children(sleepers, patience=15, still=Stillness(lambda: now[0]))
    for now[0], wanted in ((0.0, True), (10.0, True), (20.0, False), (30.0, True), (40.0, True)):
        if wanted:
            stop(sleepers[0])
        else:
            sleepers[0].send_signal(signal.SIGCONT)
            while is_stopped(sleepers[0].pid):
                time.sleep(0.01)
        assert watched.end_hung(()) == []


def test_a_worker_whose_trial_was_given_up_is_ended(sleepers: list[Process]) -> None:
    assert len(Children(sleepers).end_hung({sleepers[1].pid})) == 1
    assert (sleepers[0].poll(), sleepers[1].returncode) == (None, -signal.SIGKILL)


def test_a_stopped_worker_does_not_hold_up_the_end(sleepers: list[Process], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "END_SECONDS", 0.5)
    stop(sleepers[0])
    Children(sleepers).end()
    assert [process.returncode for process in sleepers] == [-signal.SIGKILL, -signal.SIGTERM]
