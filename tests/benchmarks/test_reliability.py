"""The reliability page says what the results hold, failures included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.reliability import begin, group_of, plan
from benchmarks.reliability_document import render
from tests.faults.campaign import Trial

from benchmarks import reliability


def report(*trials: Trial) -> dict[str, Any]:
    machine = {
        "accelerator": None,
        "processor": "P",
        "num_cores": 2,
        "memory_bytes": 1e9,
        "num_threads": 1,
        "cpu_capability": "X",
        "matmul_flops_per_second": {"fp32": 1e12},
        "system": "Linux",
        "python": "3",
        "versions": {"trl": "1.16.0"},
        "commit": None,
    }
    ours = [{"where": "w", "killed": True, "end": "same", "error": ""}]
    theirs = [{"where": "w", "killed": True, "end": "error", "error": "no checkpoint at /tmp/x/out-3/checkpoint-4"}] * 2
    theirs.append({"where": "w", "killed": False, "end": "same", "error": ""})
    return {
        "machine": machine,
        "date": "2030-01-02T00:00:00",
        "world": {"pairs": 21, "scenarios": {"dpo": {}}},
        "trials": {str(n): [trial.as_dict()] for n, trial in enumerate(trials)},
        "compared": {
            "train": {"repeatable": True, "trials": ours},
            "trl": {"repeatable": False, "trials": theirs},
        },
    }


def test_outcomes_are_counted() -> None:
    trials = [
        Trial("SIGKILL at a random instant", "dpo", "0.1 s", 3, True, 0),
        Trial("SIGKILL at a random instant", "dpo", "0.2 s", 2, True, 0),
        Trial("reference store, 1 writer, SIGKILL", "store", "0.2 s", 1, True, 0),
        Trial("data-loader worker killed", "dpo", "at its batch 2", 1, True, 0),
        Trial("memory runs out in a row", "dpo", "python", 2, True, 0, "updates differ by 3.1e-07 of the largest"),
    ]
    rows = {"kind": "rows", "inputs": 12000, "tracebacks": 0, "silent_drops": 0}
    losses = {"kind": "losses", "inputs": 6001, "tracebacks": 0, "silent_drops": 0, "wrong": 2, "date": "2030-01-03"}
    fuzz = {"kinds": [rows, losses]}
    text = render(report(*trials), fuzz)
    assert "9 faults struck 5 runs, 5 of them kills of the training process; every run survived" in text
    assert "| SIGKILL at a random instant | 2 | 5 | 2 | 0 |" in text
    assert "here 3.1e-07" in text
    assert "| killed runs | 1 | 2 |" in text
    assert "| did not go on | 0 | 2 |" in text
    assert "- 2 times: `no checkpoint at OUTPUT/checkpoint-N`" in text
    assert "| rows | 12,000 | 0 | 0 |  |  |" in text
    assert "| losses | 6,001 | 0 | 0 | 2 | 2030-01-03 |" in text
    assert "| all | 18,001 |" in text
    assert "What is untested" in text


def test_a_loss_is_said() -> None:
    text = render(report(Trial("clock jumps", "dpo", "there", 1, False, 17, "went wrong")), None)
    assert "**1 of 1 runs did not survive**; 17 bytes" in text
    assert "- clock jumps, dpo, there: went wrong" in text
    assert "No results of the fuzzing" in text


def test_names_of_trials_are_unique_and_the_plan_holds_a_hundred_kills() -> None:
    names = [name for name, _ in plan(1.0)]
    assert len(names) == len(set(names))
    kills = [name for name in names if name.split()[0] in ("instants", "operations")]
    # Three kills each.
    assert 3 * len(kills) >= 150


def test_some_kinds_are_run_again_and_the_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reliability, "machine", lambda options: {**report()["machine"], "processor": "Q"})
    before = report(Trial("clock jumps", "dpo", "there", 1, True, 0))
    before["trials"] = {"clock": before["trials"]["0"], "workers killed dpo": before["trials"]["0"]}
    out = tmp_path / "r.json"
    out.write_text(json.dumps({**before, "scale": 1.0, "finished": True}), encoding="utf-8")
    again = begin(out, 1.0, ["workers"])
    assert set(again["trials"]) == {"clock"}
    assert again["compared"] == before["compared"]
    assert again["machine"]["processor"] == "P"
    assert again["groups"]["workers"]["machine"]["processor"] == "Q"
    text = render(again, None)
    assert "Trials of the kinds `workers` were run by themselves" in text
    assert "Q, 2 cores" in text
    # Without kinds, a finished file is begun anew.
    assert begin(out, 1.0, [])["trials"] == {}


def test_processes_that_hang_are_in_the_plan() -> None:
    groups = {group_of(name) for name, _ in plan(1.0)}
    assert {"workers", "preparation", "processes", "sweep"} <= groups
