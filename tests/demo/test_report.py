"""A demo is read as a sweep over beta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from preftune.demo.run import as_sweep
from preftune.files import write_json
from preftune.report import build
from preftune.report.read import read_all


def scores(reward: float) -> dict[str, Any]:
    return {
        "reward": {"mean": reward, "low": reward - 0.01, "high": reward + 0.01, "n": 800},
        "kl": 1.5,
        "kl_interval": {"low": 1.4, "high": 1.6},
        "accuracy": 0.75,
        "accuracy_interval": {"low": 0.7, "high": 0.8},
    }


def test_the_betas_are_trials(tmp_path: Path) -> None:
    results = {
        "sft": scores(0.48),
        "betas": [{"beta": 0.05, **scores(0.6)}, {"beta": 0.1, **scores(0.65)}, {"beta": 1.0, **scores(0.58)}],
        "seconds": {"dpo_beta_0.1": 27.4, "total": 200.0},
        "versions": {"preftune": "0"},
    }
    write_json(tmp_path / "sweep.json", as_sweep(results))
    _, (sweep,) = read_all([tmp_path])
    assert [trial["params"] for trial in sweep.trials] == [{"beta": 0.05}, {"beta": 0.1}, {"beta": 1.0}]
    assert sweep.content["best"]["params"] == {"beta": 0.1}
    page = build([tmp_path], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "true reward" in page.lower()
    assert "0.48" in page
