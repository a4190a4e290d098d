"""Quantised models with an adapter; needs the quantization extra."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.cli.main import main
from preftune.models.loading import load_model_and_tokenizer
from tests.models.tiny import save_tiny_model, train_tokenizer
from tests.parity import worlds

pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(
    "flags",
    [("--load_in_4bit",), ("--load_in_4bit", "--use_bnb_nested_quant"), ("--load_in_8bit",)],
    ids=["nf4", "nf4, nested", "int8"],
)
def test_two_steps_of_dpo_on_a_quantised_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    rows = worlds.pair_rows(12)
    tokenizer = train_tokenizer([text for row in rows for text in row.values()], 300)
    model = save_tiny_model(tmp_path / "model", tokenizer, hidden_size=64, initializer_range=0.2)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    loaded: list[Any] = []

    def keep(*args: Any, **kwargs: Any) -> Any:
        loaded.append(load_model_and_tokenizer(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr("preftune.models.loading.load_model_and_tokenizer", keep)
    settings = {
        "model_name_or_path": model, "dataset_name": "rows.jsonl", "output_dir": "out", "max_steps": "2",
        "logging_steps": "1", "learning_rate": "1e-2", "per_device_train_batch_size": "4", "save_strategy": "no",
        "bf16": "false", "dtype": "float32", "report_to": "none", "lora_r": "4", "lora_target_modules": "q_proj",
    }  # fmt: skip
    given = [part for name, value in settings.items() for part in (f"--{name}", value)]
    assert main(["dpo", "--use_peft", *flags, *given]) == 0
    base = loaded[0].model
    assert getattr(base, "is_loaded_in_4bit", False) is (flags[0] == "--load_in_4bit")
    assert any(p.dtype in (torch.uint8, torch.int8) for p in base.parameters())
    history = json.loads(Path("out/trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [line["loss"] for line in history if "loss" in line]
    # The same quantised weights are the reference, so that the loss starts at ln 2.
    assert losses[0] == pytest.approx(math.log(2), abs=2e-2)
    assert losses[1] != losses[0]
    assert all(line["grad_norm"] > 0 for line in history if "loss" in line)
    assert Path("out/adapter_model.safetensors").exists()
