"""Models, tokenizers, adapters and templates from settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.config import ModelConfig
from preftune.errors import ConfigError, ModelError, SetupError
from preftune.models.loading import (
    load_model_and_tokenizer,
    load_tokenizer,
    peft_config_from,
    quantization_config_from,
    read_chat_template,
)


def test_dtype_and_keywords(world: Path) -> None:
    config = ModelConfig(model_name_or_path=str(world / "model"), dtype="bfloat16")
    assert load_model_and_tokenizer(config).model.dtype == torch.bfloat16
    loaded = load_model_and_tokenizer(config, model_init_kwargs={"dtype": torch.float32})
    assert loaded.model.dtype == torch.float32
    assert loaded.ref_model is None
    assert loaded.peft_config is None


def test_a_reference_of_its_own(world: Path) -> None:
    path = str(world / "model")
    config = ModelConfig(model_name_or_path=path, ref_model_name_or_path=path)
    loaded = load_model_and_tokenizer(config)
    assert loaded.ref_model is not None
    assert loaded.ref_model is not loaded.model
    assert load_model_and_tokenizer(config, with_reference=False).ref_model is None


def test_lora_settings_are_those_of_trl() -> None:
    from trl import ModelConfig as TheirConfig
    from trl import get_peft_config

    keywords: dict[str, Any] = {
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
    }
    assert peft_config_from(ModelConfig(**keywords)) == get_peft_config(TheirConfig(**keywords))
    assert peft_config_from(ModelConfig()) is None


def test_an_adapter_finds_its_base_and_its_tokenizer(world: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = ModelConfig(model_name_or_path=str(world / "model"))
    plain = load_model_and_tokenizer(base).model
    get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        str(tmp_path)
    )
    loaded = load_model_and_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)))
    model: Any = loaded.model
    assert isinstance(model, PeftModel)
    assert any(p.requires_grad for n, p in model.named_parameters() if "lora" in n)
    assert loaded.tokenizer.eos_token == "<eos>"
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="does not name its base model"):
        load_model_and_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)))


def test_chat_templates_from_text_and_file(world: Path, tmp_path: Path) -> None:
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "t.jinja").write_text(text, encoding="utf-8")
    for given in (text, str(tmp_path / "t.jinja")):
        config = ModelConfig(model_name_or_path=str(world / "model"), chat_template=given)
        assert load_tokenizer(config).chat_template == text
    (tmp_path / "bad.jinja").write_text("line\n{% endfor %}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.jinja:2: not a valid Jinja template"):
        read_chat_template(str(tmp_path / "bad.jinja"))


@pytest.mark.parametrize("name", ["flash", "flash_attention_9", "eager2"])
def test_attention_that_does_not_exist(world: Path, name: str) -> None:
    config = ModelConfig(model_name_or_path=str(world / "model"), attn_implementation=name)
    with pytest.raises(ModelError, match=f"^attn_implementation: .* got '{name}'; take sdpa or eager"):
        load_model_and_tokenizer(config)


def test_weights_that_are_torn(world: Path, tmp_path: Path) -> None:
    for file in (world / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="check that its files are complete") as caught:
        load_model_and_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_quantisation_needs_its_library() -> None:
    assert quantization_config_from(ModelConfig()) is None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(SetupError, match="quantization"):
            quantization_config_from(ModelConfig(load_in_4bit=True))
    else:
        made = quantization_config_from(ModelConfig(load_in_4bit=True, dtype="bfloat16"))
        assert made is not None
        assert made.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.slow
def test_code_that_lies_beside_weights_is_not_run(world: Path, tmp_path: Path) -> None:
    for file in (world / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    for name in ("c.py", "m.py"):
        (tmp_path / name).write_text(f"open({str(marker)!r}, 'w')\nclass C: ...\nclass M: ...\n")
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_model_and_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)))
    assert not marker.exists()
