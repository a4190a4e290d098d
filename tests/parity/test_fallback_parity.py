"""Models whose attention cannot be packed take the padded path, say why, and still match TRL."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.equivalence.conftest import make_rows
from tests.models.test_gate import REFUSED
from tests.models.tiny import tiny_model, train_tokenizer
from tests.parity.conftest import Setting
from tests.parity.test_dpo_parity import assert_same_logs, assert_same_weights, log_lines, train

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


_REFUSED = [REFUSED[0], REFUSED[2], ("MambaConfig", {}, "does not accept other attention functions")]


@pytest.mark.thin(2)
@pytest.mark.parametrize(("name", "sizes", "reason"), _REFUSED, ids=[name for name, _, _ in _REFUSED])
def test_fallback_matches_trl(tmp_path: Path, name: str, sizes: dict[str, Any], reason: str) -> None:
    rows = make_rows(24)
    setting = Setting.__new__(Setting)
    setting.tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in rows], 300)
    setting.path = str(tmp_path / "model")
    tiny_model(name, len(setting.tokenizer), **sizes).save_pretrained(setting.path)
    setting.tokenizer.save_pretrained(setting.path)
    setting.dataset = Dataset.from_list(rows)
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_checkpointing": False}
    theirs = train("trl", setting, tmp_path, **options)
    ours = train("preftune", setting, tmp_path, **options)
    plan = ours.plan()
    assert plan.path == "padded"
    assert reason in plan.backend_reason
    assert_same_logs(ours, theirs)
    assert_same_weights(ours, theirs)


@pytest.mark.thin(1)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_load_balancing_loss_matches_trl(tmp_path: Path, accumulation: int) -> None:
    rows = make_rows(24)
    setting = Setting.__new__(Setting)
    setting.tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in rows], 300)
    setting.path = str(tmp_path / "model")
    model = tiny_model("MixtralConfig", len(setting.tokenizer), num_local_experts=4)
    model.config.router_aux_loss_coef = 0.5
    model.save_pretrained(setting.path)
    setting.tokenizer.save_pretrained(setting.path)
    setting.dataset = Dataset.from_list(rows)
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation}
    theirs = train("trl", setting, tmp_path, **options)
    ours = train("preftune", setting, tmp_path, **options)
    assert "load-balancing" in ours.plan().backend_reason
    assert_same_logs(ours, theirs)
    assert_same_weights(ours, theirs)
    for a, b in zip(log_lines(ours), log_lines(theirs), strict=True):
        assert math.isclose(a["aux_loss"], b["aux_loss"], rel_tol=1e-4)
    packed = train("preftune", setting, tmp_path, **options, router_aux_loss_coef=0.0)
    assert packed.plan().path == "packed"
