"""The files of a sweep: plan, result, the sweet spot's YAML, and which weights stay."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from preftune.errors import ConfigError
from preftune.ownership import RunFolder
from preftune.ownership.record import entries_of
from preftune.sweep import runner
from preftune.sweep.board import SlotState
from preftune.sweep.plan import Plan, read_plan, settle_plan, study_name
from preftune.sweep.result import drop_weights, read_result, write_result
from preftune.sweep.runner import Outcome
from preftune.sweep.scores import ACCURACY
from preftune.sweep.space import Dimension
from tests.sweep.helpers import complete, held, make_plan


def test_the_plan_survives_the_disk_and_whoever_comes_first_decides(tmp_path: Path) -> None:
    plan = make_plan(num_samples=3, pruner="median")
    assert settle_plan(tmp_path / "a", plan) == plan
    assert read_plan(tmp_path / "a") == plan
    assert yaml.safe_load((tmp_path / "a" / "base.yaml").read_text()) == plan.base
    # Whose weights are kept and how many trials share a forward may change, for every worker, and nothing else.
    changed = dataclasses.replace(plan, keep="all", fuse=2)
    assert settle_plan(tmp_path / "a", changed) == changed
    assert read_plan(tmp_path / "a") == changed
    for change in ({"seed": 1}, {"metric": "eval_loss"}, {"base": {**plan.base, "beta": 1.0}}):
        with pytest.raises(ConfigError, match="another") as told:
            settle_plan(tmp_path / "a", dataclasses.replace(plan, **change))
        assert "\n" not in str(told.value)
    assert read_plan(tmp_path / "b") is None
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["base.yaml", "plan.json"]


def test_a_range_survives_too(tmp_path: Path) -> None:
    plan = make_plan(dimensions=(Dimension("beta", low=0.1, high=1.0, log=True),), cells=(), num_trials=3, search="tpe")
    settle_plan(tmp_path, plan)
    assert read_plan(tmp_path) == plan


def test_a_file_that_is_no_plan_is_told(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"verb": "dpo"}')
    with pytest.raises(ConfigError, match="not the plan"):
        read_plan(tmp_path)


def test_two_sweeps_of_one_name_have_studies_of_their_own(tmp_path: Path) -> None:
    first, second = make_plan(), make_plan(seed=1)
    assert study_name(tmp_path / "a", first) == study_name(tmp_path / "a", make_plan(cwd="/elsewhere"))
    assert study_name(tmp_path / "a", first) != study_name(tmp_path / "a", second)


def states(plan: Plan, folder: Path, right: dict[int, int]) -> list[SlotState]:
    """Finished trials with so many of 100 held-out pairs ranked right, and weights; the others diverged."""
    found = []
    for slot, cell in enumerate(plan.cells):
        run = folder / "trials" / f"{slot:03d}"
        run.mkdir(parents=True)
        (run / "model.safetensors").write_text("weights")
        (run / "checkpoint-3").mkdir()
        (run / "checkpoint-3" / "model.safetensors").write_text("weights")
        if slot in right:
            held((np.arange(100) < right[slot]).tolist()).save(run)
            outcome = complete(right[slot] / 100, run=f"trials/{slot:03d}", num_scored=16 * (slot == 0), num_found=16)
            outcome.num_found = 16 * (slot != 0)
        else:
            outcome = Outcome(runner.DIVERGED, "loss is nan", run=f"trials/{slot:03d}", num_found=16)
        found.append(SlotState(slot, outcome.state, cell, outcome))
    return found


def test_the_result_has_what_readers_rely_on(tmp_path: Path) -> None:
    plan = make_plan()
    right = {0: 50, 1: 70, 2: 52, 3: 90, 4: 89, 5: 60, 6: 88}
    found = write_result(plan, states(plan, tmp_path, right), tmp_path)
    assert found == read_result(tmp_path)
    assert found["reference_passes"] == 1.0
    assert found["reference_pairs"] == 16
    assert found["seconds"] == 7.0
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 7 + ["diverged"] * 2
    # 90 against 89: one discordant pair, mid-p 0.5; against 70: twenty, far below 5 % after Holm.
    tied = [trial["tied_with_best"] for trial in found["trials"]]
    assert tied[3] is True
    assert tied[4] is True
    assert tied[1] is False
    assert tied[7] is False
    assert found["best"]["highest_mean"] == 3
    cells = found["maps"][ACCURACY]["cells"]
    assert len(cells) == 7
    assert cells[3] == {"number": 3, "params": plan.cells[3], **found["trials"][3]["metrics"][ACCURACY]} | {
        "tied_with_best": True
    }
    best = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert best["beta"] == found["best"]["params"]["beta"]
    assert best["output_dir"] == str(tmp_path / "best")
    assert best["model_name_or_path"] == "model"


def test_nothing_complete_is_no_best(tmp_path: Path) -> None:
    plan = make_plan()
    found = write_result(plan, states(plan, tmp_path, {}), tmp_path)
    assert found["best"] is None
    assert not (tmp_path / "best.yaml").exists()
    assert json.loads((tmp_path / "sweep.json").read_text())["trials"][0]["reason"] == "loss is nan"


@pytest.mark.parametrize(
    ("keep", "final", "kept"),
    [("best", False, [3, 4]), ("best", True, None), ("all", True, list(range(9))), ("none", True, [])],
)
def test_weights(keep: str, final: bool, kept: Any, tmp_path: Path) -> None:
    plan = make_plan(keep=keep)
    found = states(plan, tmp_path, {0: 50, 1: 60, 2: 52, 3: 90, 4: 89, 5: 60, 6: 61})
    sweet = write_result(plan, found, tmp_path)["best"]["number"]
    for slot in range(9):
        trial = RunFolder.open(tmp_path / f"trials/{slot:03d}", f"{slot}" * 32)
        trial.note(["model.safetensors"])
        files = [path for path in (trial.folder / "checkpoint-3").rglob("*") if path.is_file()]
        trial.adopt_folder("checkpoint-3", entries_of(trial.folder / "checkpoint-3", files))
        trial.record.write(trial.folder)
        (trial.folder / "adapter_model.safetensors").write_bytes(b"somebody else's")
    drop_weights(plan, found, tmp_path, final=final)
    left = [slot for slot in range(9) if (tmp_path / f"trials/{slot:03d}/model.safetensors").exists()]
    assert left == ([sweet] if kept is None else kept)
    assert left == [slot for slot in range(9) if (tmp_path / f"trials/{slot:03d}/checkpoint-3").exists()]
    assert (tmp_path / "trials/000/held_out.npz").exists()
    assert all((tmp_path / f"trials/{slot:03d}/adapter_model.safetensors").exists() for slot in range(9))


def test_passwords_do_not_reach_the_result(tmp_path: Path) -> None:
    plan = make_plan(storage="postgresql://me:secret@host/sweeps")
    write_result(plan, states(plan, tmp_path, {0: 50, 1: 60}), tmp_path)
    assert "secret" not in (tmp_path / "sweep.json").read_text()
