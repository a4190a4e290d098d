"""Sweeps and runs that report to W&B, MLflow and Trackio: what is found there afterwards, read from their files."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sqlite3
import struct
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.conftest import SMALL_RUN

pytestmark = pytest.mark.extras

SWEEP = ("sweep", "--config", "base.yaml", "--out", "out", "--keep", "none", "--param", "beta=0.05,0.5,0.9")
# In a process of its own, as trackers keep their state. Trial 1 fails when everything has been logged.
FAILING = """
import sys
import preftune.sweep.trials as sweep_trial
from preftune.cli.main import main
leave = sweep_trial.PairTrials._leave
def fails(self, this, trial, *rest, **named):
    if trial.number == 1:
        raise RuntimeError("the disk is gone")
    return leave(self, this, trial, *rest, **named)
sweep_trial.PairTrials._leave = fails
sys.exit(main(sys.argv[1:]))
"""
NAMES = ["out-000", "out-001", "out-002"]


@pytest.fixture
def place(world: Path, tmp_path: Path) -> Path:
    for name in ("model", "pairs.jsonl"):
        (tmp_path / name).symlink_to(world / name)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(SMALL_RUN), encoding="utf-8")
    return tmp_path


def run(place: Path, *argv: str, script: str | None = None) -> str:
    """Run the command line in a process of its own, and return what it says."""
    ours = ("WANDB_", "MLFLOW_", "TRACKIO_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    settings = {
        "PREFTUNE_CACHE": str(place / "references"),
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{place / 'mlflow.db'}",
        "TRACKIO_DIR": str(place / "trackio"),
    }
    program = ["-m", "preftune"] if script is None else ["-c", script]
    done = subprocess.run(
        [sys.executable, *program, *argv], cwd=place, env={**clean, **settings}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    """Step and value of a metric in a run's own log, the first value of a step alone."""
    found: dict[int, float] = {}
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if name in event.get("logs", {}):
            found.setdefault(event["step"], event["logs"][name])
    return sorted(found.items())


def states(place: Path) -> list[str]:
    content = json.loads((place / "out" / "sweep.json").read_text(encoding="utf-8"))
    return [trial["state"] for trial in content["trials"]]


def check_losses(place: Path, losses: dict[str, list[tuple[int, float]]]) -> None:
    """Every trial has a run of its own, with its own figures and nobody else's."""
    assert sorted(losses) == NAMES
    for name, values in losses.items():
        expected = logged(place / "out" / "trials" / name.removeprefix("out-"), "loss")
        assert [step for step, _ in expected] == [1, 2, 3]
        assert [step for step, _ in values] == [1, 2, 3]
        assert [value for _, value in values] == pytest.approx([value for _, value in expected])


# ---- MLflow --------------------------------------------------------------------------------------------------------


def mlflow_runs(place: Path) -> dict[str, dict[str, Any]]:
    """Runs by name, with status, experiment, parameters, and the history of every metric."""
    with sqlite3.connect(place / "mlflow.db") as database:
        rows = database.execute(
            "select run_uuid, runs.name, status, experiments.name from runs join experiments using (experiment_id)"
        ).fetchall()
        assert len({name for _, name, _, _ in rows}) == len(rows)
        runs = {}
        for number, name, status, experiment in rows:
            metrics: dict[str, list[tuple[int, float]]] = defaultdict(list)
            query = "select key, step, value from metrics where run_uuid = ? order by step, timestamp"
            for key, step, value in database.execute(query, (number,)):
                metrics[key].append((step, value))
            params = dict(database.execute("select key, value from params where run_uuid = ?", (number,)).fetchall())
            runs[name] = {"status": status, "experiment": experiment, "params": params, "metrics": metrics}
    return runs


def test_mlflow_has_a_run_per_trial_in_one_experiment(place: Path) -> None:
    run(place, *SWEEP, "--report_to", "mlflow", script=FAILING)
    assert states(place) == ["complete", "failed", "complete"]
    runs = mlflow_runs(place)
    check_losses(place, {name: one["metrics"]["loss"] for name, one in runs.items()})
    assert {one["experiment"] for one in runs.values()} == {"out"}
    assert [runs[name]["status"] for name in NAMES] == ["FINISHED", "FAILED", "FINISHED"]
    assert [runs[name]["params"]["beta"] for name in NAMES] == ["0.05", "0.5", "0.9"]
    # The evaluation after training is in the same run.
    assert all([step for step, _ in runs[name]["metrics"]["eval_loss"]] == [3] for name in NAMES)


def test_mlflow_tables_are_made_by_one_of_several_workers(place: Path) -> None:
    run(place, *SWEEP, "--report_to", "mlflow", "--workers", "2")
    assert states(place) == ["complete"] * 3
    check_losses(place, {name: one["metrics"]["loss"] for name, one in mlflow_runs(place).items()})


def test_mlflow_has_a_run_per_trial_of_one_forward(place: Path) -> None:
    run(place, *SWEEP, "--report_to", "mlflow", "--fuse", "3", "--use_peft", "--lora_target_modules", "all-linear")
    runs = mlflow_runs(place)
    assert sorted(runs) == NAMES
    for name in NAMES:
        state = json.loads((place / "out" / "trials" / name[-3:] / "trainer_state.json").read_text(encoding="utf-8"))
        expected = [(line["step"], line["loss"]) for line in state["log_history"] if "loss" in line]
        assert len(expected) == 3
        assert runs[name]["metrics"]["loss"] == expected
        assert not [metric for metric in runs[name]["metrics"] if metric[0].isdigit()]
    assert [runs[name]["params"]["beta"] for name in NAMES] == ["0.05", "0.5", "0.9"]


def test_mlflow_has_one_run_for_a_run_of_a_training_verb(place: Path) -> None:
    options = ("--output_dir", "one", "--run_name", "one", "--report_to", "mlflow")
    splits = ("--dataset_test_split", "train", "--do_eval")
    run(place, "dpo", "--config", "base.yaml", *options, *splits)
    runs = mlflow_runs(place)
    assert list(runs) == ["one"]
    assert runs["one"]["status"] == "FINISHED"
    assert [step for step, _ in runs["one"]["metrics"]["eval_loss"]] == [3]
    assert runs["one"]["metrics"]["loss"] == logged(place / "one", "loss")


# ---- W&B -----------------------------------------------------------------------------------------------------------


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of an offline run: blocks of 32 KiB with LevelDB's framing around protocol buffers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wandb_internal_pb2: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found = wandb_internal_pb2.Record()
            found.ParseFromString(record)
            record = b""
            yield found


def wandb_run(path: Path) -> dict[str, Any]:
    """Name, group, settings, history and end of an offline run."""
    one: dict[str, Any] = {"config": {}, "loss": []}
    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            one |= {"name": record.run.display_name, "group": record.run.run_group}
        elif kind == "config":
            one["config"] |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "exit":
            one["exit"] = record.exit.exit_code
        elif kind == "history":
            line = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if "train/loss" in line:
                one["loss"].append((int(line["train/global_step"]), float(line["train/loss"])))
            one["evaluated"] = one.get("evaluated", False) or "eval/rewards/margins" in line
    return one


def test_wandb_has_a_run_per_trial_in_one_group(place: Path) -> None:
    run(place, *SWEEP, "--report_to", "wandb", script=FAILING)
    assert states(place) == ["complete", "failed", "complete"]
    runs = [wandb_run(path) for path in sorted(place.glob("wandb/offline-run-*/*.wandb"))]
    assert len(runs) == len(NAMES)
    by_name = {one["name"]: one for one in runs}
    check_losses(place, {name: one["loss"] for name, one in by_name.items()})
    assert {one["group"] for one in runs} == {"out"}
    assert [by_name[name]["exit"] for name in NAMES] == [0, 1, 0]
    assert [by_name[name]["config"]["beta"] for name in NAMES] == [0.05, 0.5, 0.9]
    assert all(one["evaluated"] for one in runs)


# ---- Trackio -------------------------------------------------------------------------------------------------------


def test_trackio_has_a_run_per_trial_in_one_project(place: Path) -> None:
    run(place, *SWEEP, "--report_to", "trackio", script=FAILING)
    assert states(place) == ["complete", "failed", "complete"]
    # One file per project.
    (path,) = (place / "trackio").rglob("*.db")
    assert path.stem == "out"
    losses: dict[str, list[tuple[int, float]]] = defaultdict(list)
    evaluated, runs = set(), set()
    with sqlite3.connect(path) as database:
        for name, number, text in database.execute("select run_name, run_id, metrics from metrics order by id"):
            line = json.loads(text)
            runs.add((name, number))
            if "train/loss" in line:
                losses[name].append((line["train/global_step"], line["train/loss"]))
            if "eval/rewards/margins" in line:
                evaluated.add(name)
    check_losses(place, losses)
    assert len(runs) == len(NAMES)
    assert evaluated == set(NAMES)
