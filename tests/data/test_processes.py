"""Rows prepared in several processes: the same result, and no waiting without end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import psutil
import pytest
from datasets import Dataset

from preftune.data.batches import Outcome, to_table
from preftune.data.options import DataOptions
from preftune.data.processes import in_processes
from preftune.errors import ConfigError, DataError, SetupError

ROWS = Dataset.from_dict({"n": list(range(40))})


class Doubling:
    """Doubles numbers; one row does something else first."""

    columns, floats = ("ids",), ()

    def __init__(self, at: int = -1, act: Any = None) -> None:
        self.at, self.act = at, act

    def outcomes(self, rows: list[dict[str, Any]], indices: Sequence[int]) -> list[Outcome]:
        if self.at in indices:
            self.act()
        return [Outcome(lists=([2 * row["n"], number],)) for row, number in zip(rows, indices, strict=True)]


def run(worker: Doubling, patience: float = 60.0) -> list[list[int]]:
    tables = in_processes(ROWS, partial(to_table, worker=worker), 2, "Preparing train", 7, patience)
    return [ids for table in tables for ids in table["ids"].to_pylist()]


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


def test_no_bar_is_drawn_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    run(Doubling())
    assert capfd.readouterr().err == ""


def test_rows_keep_their_order() -> None:
    assert run(Doubling()) == [[2 * n, n] for n in range(40)]


@pytest.mark.parametrize("act", [lambda: time.sleep(600), lambda: os.kill(os.getpid(), signal.SIGSTOP)])
def test_a_process_that_hangs_ends_in_one_error_and_is_gone(act: Any) -> None:
    before = len(children())
    began = time.monotonic()
    with pytest.raises(
        SetupError, match=r"no batch for 1 s.*got 2; leave dataset_num_proc out, or raise worker_timeout"
    ):
        run(Doubling(20, act), patience=1.0)
    assert time.monotonic() - began < 60
    deadline = time.monotonic() + 10
    while len(children()) > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(children()) == before


def test_a_process_that_dies_ends_in_one_error() -> None:
    with pytest.raises(SetupError, match="a process died"):
        run(Doubling(20, lambda: os.kill(os.getpid(), signal.SIGKILL)), patience=0.0)


def test_errors_of_rows_come_through() -> None:
    def bad() -> None:
        raise DataError("no answer", where="row 20", value=3)

    def late() -> None:
        raise TimeoutError("the row's own")

    with pytest.raises(DataError, match="row 20: no answer; got 3"):
        run(Doubling(20, bad))
    with pytest.raises(TimeoutError, match="the row's own"):
        run(Doubling(20, late))


def test_no_process_outlives_its_parent() -> None:
    code = (
        "import os, sys, time; from tests.data.test_processes import Doubling, run\n"
        "run(Doubling(20, lambda: (print(os.getpid(), flush=True), time.sleep(600))))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("value", [-1, float("inf"), float("nan"), True])
def test_times_that_are_none(value: Any) -> None:
    with pytest.raises(ConfigError, match="worker_timeout"):
        DataOptions(worker_timeout=value)
