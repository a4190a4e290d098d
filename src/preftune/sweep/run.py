"""Run the trials of a sweep: here, in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from preftune.sweep.board import Board
from preftune.sweep.children import Children
from preftune.sweep.fused import FusedTrials
from preftune.sweep.options import STORAGE_VARIABLE
from preftune.sweep.plan import Plan, nothing_begun, read_plan
from preftune.sweep.result import drop_weights
from preftune.sweep.trials import PairTrials
from preftune.sweep.worker import Reporter, work

#: Where processes of a cluster find :func:`runner_of`.
FACTORY = "preftune.sweep.run:runner_of"


def runner_of(plan: Plan, folder: Path) -> PairTrials:
    """The runner of a sweep's trials; paths count from where the sweep was begun."""
    return FusedTrials(plan, folder) if plan.fuse > 1 else PairTrials(plan, folder)


def run_trials(
    plan: Plan, folder: Path, board: Board, reporter: Reporter, *, workers: int = 1, ray: str | None = None
) -> None:
    """Run what is left of a sweep.

    Args:
        plan: The sweep.
        folder: Its folder.
        board: The study.
        reporter: Told what happens.
        workers: Processes of this machine, or trials at a time on the cluster.
        ray: Address of a Ray cluster, or ``local``.

    Raises:
        PreftuneError: Data or model cannot be used by any trial, or Ray cannot be reached.
    """
    if ray is not None:
        from preftune.sweep.ray_tune import run_on_ray

        run_on_ray(plan, folder, ray, workers, board, reporter, FACTORY)
    elif workers > 1 and not board.is_done():
        _with_workers(plan, folder, board, reporter, workers)
    # Whatever a worker left behind when it died is done here.
    _work(plan, folder, board, reporter)


def run_worker(folder: Path) -> None:
    """Run trials of a sweep that was begun in ``folder``, until none is left to begin.

    Raises:
        ConfigError: No sweep was begun there.
    """
    begun = read_plan(folder)
    if begun is None:
        raise nothing_begun(folder)
    plan = dataclasses.replace(begun, storage=os.environ.get(STORAGE_VARIABLE) or begun.storage)
    _work(plan, folder, Board(plan, folder), Reporter(), wait=False)


def _work(plan: Plan, folder: Path, board: Board, reporter: Reporter, *, wait: bool = True) -> None:
    def tidy() -> None:
        drop_weights(plan, board.states(), folder, final=False)

    work(board, runner_of(plan, folder), folder, reporter=reporter, tidy=tidy, wait=wait)


def _with_workers(plan: Plan, folder: Path, board: Board, reporter: Reporter, workers: int) -> None:
    """Start workers, show what they do, and wait for them."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "preftune", "sweep", "--out", str(folder), "--as_worker"],
            env=_environment(number, workers, plan.storage),
        )
        for number in range(workers)
    ]
    children = Children(processes)
    try:
        while any(process.poll() is None for process in processes):
            reporter.waiting(board)
            for line in (*board.tend(), *children.end_hung(board.hung)):
                reporter.note(line)
            time.sleep(0.5)
    except KeyboardInterrupt:
        # The terminal has told them too: each gives its trial back.
        children.wait()
        raise
    finally:
        children.end()
    reporter.waiting(board)


def _environment(number: int, workers: int, storage: str | None) -> dict[str, str]:
    """One accelerator per worker where there are several, else its share of the processor."""
    found = dict(os.environ)
    if storage is not None:
        # On the command line everybody on the machine could read a password.
        found[STORAGE_VARIABLE] = storage
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_devices > 1:
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = named.split(",") if named else [str(device) for device in range(num_devices)]
        found["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    elif not num_devices:
        found.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // workers)))
    return found
