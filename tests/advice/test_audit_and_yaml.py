"""What is read from an audit, and what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from preftune.advice import Case, Noise, advise
from preftune.advice.case import noise_from_audit
from preftune.advice.yaml_file import configuration, write_configuration
from preftune.errors import ConfigError, DataError
from preftune.files import write_json
from preftune.training.plan import MemoryEstimate, TimeEstimate


def audit(path: Path, noise: Any) -> Path:
    path.write_text(json.dumps({"dataset": "d", "num_rows": 10, "findings": [], "noise": noise}), encoding="utf-8")
    return path


def test_the_estimate_of_an_audit_is_read(tmp_path: Path) -> None:
    found = noise_from_audit(audit(tmp_path / "a.json", {"estimate": 0.2, "low": 0.1, "high": 0.3, "judge": "bt"}))
    assert found == Noise(0.2, 0.1, 0.3, "audit (bt)")


@pytest.mark.parametrize(
    ("noise", "wanted"),
    [
        ({"estimate": -0.02, "low": -0.1, "high": 0.05}, (0.0, 0.0, 0.05)),
        ({"estimate": 0.55, "low": 0.45, "high": 0.65}, (0.5, 0.45, 0.5)),
        ({"estimate": 0.2, "low": None, "high": None}, (0.2, 0.2, 0.2)),
        ({"estimate": None, "low": None, "high": None}, None),
        ({}, None),
        (None, None),
    ],
)
def test_ends_outside_of_shares_are_clipped_and_no_estimate_is_none(
    tmp_path: Path, noise: Any, wanted: tuple[float, float, float] | None
) -> None:
    found = noise_from_audit(audit(tmp_path / "a.json", noise))
    assert (None if found is None else (found.estimate, found.low, found.high)) == wanted


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"noise": {"estimate": "many"}}', "3"])
def test_what_is_no_audit_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "audit.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="audit"):
        noise_from_audit(path)
    with pytest.raises(DataError, match="audit"):
        noise_from_audit(tmp_path / "none.json")


def test_json_is_whole_and_holds_the_contract(tmp_path: Path) -> None:
    case = Case("dpo", ("sigmoid",), 7_000_000_000, noise=Noise(0.3, 0.2, 0.4))
    advice = advise(case, memory=MemoryEstimate(weights=3), time=TimeEstimate(seconds=math.nan))
    write_json(tmp_path / "deep" / "advice.json", advice.as_dict())
    content = json.loads((tmp_path / "deep" / "advice.json").read_text(encoding="utf-8"))
    assert {"settings", "flags", "memory", "time"} <= set(content)
    assert content["memory"]["total"] == 3
    assert content["time"]["seconds"] is None
    for setting in content["settings"]:
        assert {"field", "value", "low", "high", "reason", "sources", "kind", "contradiction"} == set(setting)
        assert all({"name", "says"} == set(source) for source in setting["sources"])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["advice.json"]


def test_yaml_keeps_what_was_set_and_reads_back_as_numbers(tmp_path: Path) -> None:
    advice = advise(Case("dpo", ("sigmoid",), 7_000_000_000, num_pairs=60_000))
    kept = {
        "dataset_name": "yes",
        "learning_rate": 1.0,
        "eval_strategy": "no",
        "lora_target_modules": ["a", "b"],
        "weight_decay": 1e-05,
        "dataset_mixture": {"datasets": [{"id": "x: y"}]},
    }
    text = configuration(advice, kept)
    content = yaml.safe_load(text)
    assert content["learning_rate"] == 1e-6
    assert content["beta"] == 0.1
    assert {name: content[name] for name in kept if name != "learning_rate"} == {
        name: value for name, value in kept.items() if name != "learning_rate"
    }
    assert max(map(len, text.splitlines())) <= 120
    for setting in advice.settings:
        assert f"{setting.kind}" in text
    write_configuration(text, tmp_path / "out.yaml")
    with pytest.raises(ConfigError, match="left as it is"):
        write_configuration(text, tmp_path / "out.yaml")
