"""Adapters of quantised bases: merged into the weights they were trained on; needs the quantization extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune.export import ExportOptions, export
from tests.export.conftest import MakeRun
from tests.models.tiny import save_tiny_model

pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("ignore")]

IDS = torch.tensor([[5, 17, 9, 33, 80, 41, 7, 250, 3, 3, 60, 12]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits.float()
    return found


def by_hand(model: Any, how: str) -> dict[str, torch.Tensor]:
    """The weights that a quantised model stands for."""
    import bitsandbytes

    found = {}
    for name, module in model.named_modules():
        if how == "load_in_4bit" and isinstance(module, bitsandbytes.nn.Linear4bit):
            found[name] = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif how == "load_in_8bit" and isinstance(module, bitsandbytes.nn.Linear8bitLt):
            found[name] = module.weight.data.float() * module.weight.SCB[:, None] / 127
    return found


@pytest.mark.parametrize("how", ["load_in_4bit", "load_in_8bit"])
def test_the_adapter_is_merged_into_the_weights_it_was_trained_on(
    make_run: MakeRun, base: Path, tmp_path: Path, how: str
) -> None:
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    tokenizer = AutoTokenizer.from_pretrained(base / "base")
    wide = save_tiny_model(tmp_path / "wide", tokenizer, hidden_size=128, intermediate_size=256, initializer_range=0.1)
    model_settings = {"model_name_or_path": {"value": wide}, how: {"value": True}}
    run = make_run(model=Path(wide), record={"settings": {"model": model_settings}})
    quantised = AutoModelForCausalLM.from_pretrained(
        wide,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(**{how: True}, bnb_4bit_quant_type="nf4"),
        device_map={"": "cpu"},
    )
    weights = by_hand(quantised, how)
    assert len(weights) == 14
    plain: Any = AutoModelForCausalLM.from_pretrained(wide)
    for name, weight in weights.items():
        plain.get_submodule(name).weight.data = weight.float()
    trained = logits(PeftModel.from_pretrained(plain, str(run)))
    differences = {}
    for which in ("dequantized", "original"):
        done = export(
            ExportOptions(str(run), output_dir=str(tmp_path / which), dtype="float32", num_pairs=0, qlora_base=which)
        )
        merged = AutoModelForCausalLM.from_pretrained(done.folder)
        assert "quantization_config" not in merged.config.to_dict()
        differences[which] = float((logits(merged) - trained).abs().max())
    assert differences["dequantized"] < 1e-4 < 1e-2 < differences["original"]
