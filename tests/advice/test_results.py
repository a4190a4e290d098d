"""The committed results belong to the present rules, and their summaries are right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks import advice as reward
from benchmarks import memory
from preftune.advice import Case, Noise, advise

ROOT = Path(__file__).resolve().parents[2]


def committed(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def test_what_was_measured_is_what_is_advised_today() -> None:
    report = committed(reward.OUT)
    cells = [cell for cell in report["cells"] if cell["contender"] == reward.ADVISED]
    assert len(cells) >= 10
    for cell in cells:
        level = cell["noise"]
        noise: Noise | None = Noise(level, max(0.0, level - 0.1), level + 0.1)
        if report["noise"] == "audit":
            noise = cell["told"] and Noise(*cell["told"])
        pairs = report["references"][str(cell["seed"])]["num_pairs"]
        values = advise(Case("dpo", ("sigmoid",), 491_008, num_pairs=pairs, noise=noise)).values()
        assert {name: cell["fields"][name] for name in values} == values


def test_trl_defaults_are_those_of_trl() -> None:
    from trl import DPOConfig

    found = reward.trl_defaults()
    defaults = {name: field.default for name, field in DPOConfig.__dataclass_fields__.items()}
    for name in ("beta", "learning_rate", "num_train_epochs", "label_smoothing", "per_device_train_batch_size"):
        assert found[name] == defaults[name]
    assert found["loss_type"] == ["sigmoid"]
    cells = [cell for cell in committed(reward.OUT)["cells"] if cell["contender"] == reward.DEFAULTS]
    assert all(cell["fields"]["learning_rate"] == defaults["learning_rate"] for cell in cells)


def made_up(gaps: list[float]) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    cells = []
    for seed, gap in enumerate(gaps):
        base = draw.random(20)
        for contender, rewards in ((reward.ADVISED, base + gap), (reward.SCALED, base)):
            mean = {"mean": float(rewards.mean())}
            cells.append({"seed": seed, "noise": 0.3, "contender": contender, "reward": mean})
    # A seed that was not finished counts for nothing.
    cells.append({"seed": 99, "noise": 0.3, "contender": reward.ADVISED, "reward": {"mean": 9.0}})
    return {"cells": cells}


def test_the_interval_over_seeds_is_students() -> None:
    gaps = [0.01, 0.03, -0.01, 0.02, 0.025]
    found = reward.difference(made_up(gaps), 0.3, reward.SCALED)
    interval = stats.ttest_1samp(gaps, 0.0).confidence_interval(0.95)
    assert (found.num, found.num_above) == (5, 4)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.mean == pytest.approx(np.mean(gaps))


def test_text_goes_between_its_marks(tmp_path: Path) -> None:
    path = tmp_path / "doc.md"
    path.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nafter\n", encoding="utf-8")
    memory.place(path, "a", "new")
    assert path.read_text(encoding="utf-8") == "before\n<!-- a -->\nnew\n<!-- /a -->\nafter\n"
    with pytest.raises(ValueError, match="no place for b"):
        memory.place(path, "b", "new")


def test_the_document_holds_what_the_files_say() -> None:
    document = (ROOT / "docs" / "advice.md").read_text(encoding="utf-8")
    assert reward.summary(committed(reward.OUT)) in document
    assert memory.summary(committed(memory.OUT)) in document


def test_the_stated_error_holds_for_all_committed_cells() -> None:
    cells = committed(memory.OUT)["cells"]
    assert {cell["peft"] for cell in cells} == {"full", "lora"}
    assert {cell["dtype"] for cell in cells} == {"fp32", "bf16"}
    assert {cell["checkpointing"] for cell in cells} == {False, True}
    assert {cell["shape"] for cell in cells} >= {"19m", memory.PRETRAINED}
    for cell in cells:
        growth, seconds = memory.ratios(cell)
        assert 1 / memory.STATED_FACTOR < growth < memory.STATED_FACTOR, memory.line(cell)
        assert 1 / memory.STATED_FACTOR < seconds < memory.STATED_FACTOR, memory.line(cell)
        # What the plan of the very run said is what was predicted without it.
        if "dry_run" in cell:
            assert cell["dry_run"] == cell["predicted"]["memory"]["total"]


@pytest.mark.slow
def test_a_fresh_run_grows_as_was_predicted(tmp_path: Path) -> None:
    spec = {"shape": "19m", "rows": "short", "peft": "full", "dtype": "fp32", "checkpointing": False, "threads": 1}
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.memory", "--cell", json.dumps(spec), str(result)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    growth, _ = memory.ratios(committed(result))
    assert 1 / memory.STATED_FACTOR < growth < memory.STATED_FACTOR
