"""The same trials on a Ray cluster.

Ray Tune places and watches processes; which trial a process runs, it asks the study, as every other worker does.
Trials, seeds and figures are therefore the same as without Ray, a sweep may be begun on one and finished on the other,
and local workers may join it meanwhile. The sweep's folder has to be one that all nodes share.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from preftune.errors import SetupError
from preftune.sweep.board import Board
from preftune.sweep.options import STORAGE_VARIABLE
from preftune.sweep.plan import Plan, read_plan
from preftune.sweep.runner import Outcome, TrialRunner, TrialSpec
from preftune.sweep.worker import POLL_SECONDS, Reporter, work

LOCAL = "local"
#: Where processes of a cluster look for a runner: ``module:function(plan, folder)``.
Factory = str
# Per process: actors are used again for later trials, and then have model and tokens already.
_SESSIONS: dict[str, tuple[Board, TrialRunner]] = {}


class _Last(Reporter):
    def __init__(self) -> None:
        self.outcome: Outcome | None = None

    def finished(self, trial: TrialSpec, outcome: Outcome) -> None:
        self.outcome = outcome


def run_next(config: dict[str, Any]) -> None:
    """One Ray trial: run the next trial of the study in this process, and report its figures to Tune.

    Args:
        config: ``folder``, ``cwd``, ``factory``, and ``place`` in the queue, which only tells the Ray trials apart.
    """
    from ray import tune

    os.chdir(config["cwd"])
    board, runner = session(config["folder"], config["factory"])
    last = _Last()
    work(board, runner, Path(config["folder"]), reporter=last, wait=False, most=1)
    if last.outcome is None:
        # Somebody else has run it in the meantime.
        tune.report({"state": "none left"})
        return
    means = {name: entry["mean"] for name, entry in last.outcome.metrics.items() if entry["mean"] is not None}
    tune.report({"state": last.outcome.state, **means})


def session(folder: str, factory: Factory) -> tuple[Board, TrialRunner]:
    """Study and runner of a sweep in this process, made on first use."""
    if folder not in _SESSIONS:
        plan = read_plan(Path(folder))
        if plan is None:
            raise SetupError(
                "the sweep's folder is not there on this node", where=folder, remedy="use a folder that all nodes share"
            )
        plan = replace(plan, storage=os.environ.get(STORAGE_VARIABLE) or plan.storage)
        module, _, name = factory.partition(":")
        make: Callable[[Plan, Path], TrialRunner] = getattr(import_module(module), name)
        _SESSIONS[folder] = (Board(plan, Path(folder)), make(plan, Path(folder)))
    return _SESSIONS[folder]


def run_on_ray(
    plan: Plan, folder: Path, address: str, workers: int, board: Board, reporter: Reporter, factory: Factory
) -> None:
    """Run what is left of a sweep on a Ray cluster.

    Args:
        plan: The sweep.
        folder: Its folder; all nodes must see it under this path.
        address: Of the cluster, or ``local`` to start one of ``workers`` processes here.
        workers: Trials at a time.
        board: The study, as this process sees it.
        reporter: Told what happens.
        factory: Makes the runner in the cluster's processes.

    Raises:
        SetupError: Ray is missing, or the cluster cannot be reached or refuses the token.
    """
    num_left = sum(state.outcome is None for state in board.states())
    if not num_left:
        return
    if address == LOCAL and "ray" not in sys.modules:
        # Ray reads these once, when it is imported.
        own_token()
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise SetupError("Ray is not installed", where="--ray", remedy="run pip install 'preftune[ray]'") from error
    # Tune would swallow Ctrl-C and return as if it were done.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Its tables would be between the sweep's own lines.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    if plan.storage:
        os.environ[STORAGE_VARIABLE] = plan.storage
    started_here = not ray.is_initialized()
    if started_here:
        _connect(address, workers, plan.storage)
    space = {
        "folder": str(folder.resolve()),
        "cwd": plan.cwd,
        "factory": factory,
        "place": tune.grid_search(list(range(num_left))),
    }
    watching = _Watching(board, reporter)
    try:
        tuner = tune.Tuner(
            tune.with_resources(run_next, _resources()),
            param_space=space,
            tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=workers),
            run_config=tune.RunConfig(name="tune", storage_path=str(folder.resolve() / "ray"), verbose=0),
        )
        with watching:
            results = tuner.fit()
        for failure in results.errors:
            reporter.note(f"a Ray trial failed: {_last_line(failure)}")
    finally:
        if started_here:
            ray.shutdown()


def _connect(address: str, workers: int, storage: str | None) -> None:
    import ray

    env = {STORAGE_VARIABLE: storage} if storage else {}
    keywords: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(
            address=address, logging_level=logging.ERROR, log_to_driver=False, runtime_env={"env_vars": env}, **keywords
        )
    except (ray.exceptions.RayError, ConnectionError, OSError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        remedy = "check the address, as `ray status` shows it"
        if "uthenticat" in f"{type(error).__name__} {said}":
            remedy = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"
        raise SetupError(f"cannot connect to Ray ({said})", where="--ray", value=address, remedy=remedy) from error


def own_token() -> None:
    """Give a cluster that is started here a token of its own.

    Ray asks for one by default from 2.59 on and would write it to the home folder; earlier versions ignore it. What the
    user has set stands.
    """
    named = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if not any(os.environ.get(name) for name in named):
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _resources() -> dict[str, float]:
    import ray

    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return {"cpu": 1, "gpu": 1} if found.get("GPU") else {"cpu": 1}


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else type(error).__name__


class _Watching:
    """Shows what the cluster does while Tune blocks."""

    def __init__(self, board: Board, reporter: Reporter) -> None:
        self._board, self._reporter = board, reporter
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            self._reporter.waiting(self._board)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self._reporter.waiting(self._board)
