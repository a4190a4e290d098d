"""A tiny run folder of every kind of adapter, with the record that a training run leaves."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.tiny import save_tiny_model, train_tokenizer

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|system|>\nYou help.<eos>\n' }}{% endif %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
WORDS = ("the", "a", "film", "plot", "was", "very", "nice", "dull", "good", "bad", "I", "think", "it", "or", "great")

MakeRun = Callable[..., Path]


def pair_rows(count: int) -> list[dict[str, Any]]:
    draw = random.Random(0)

    def text() -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 12)))

    def said(role: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text()}]

    return [{"prompt": said("user"), "chosen": said("assistant"), "rejected": said("assistant")} for _ in range(count)]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model ``base`` and the pairs ``train.jsonl`` and ``held.jsonl``."""
    folder = tmp_path_factory.mktemp("export")
    rows = pair_rows(36)
    tokenizer = train_tokenizer([json.dumps(row) for row in rows], 320)
    tokenizer.chat_template = TEMPLATE
    save_tiny_model(folder / "base", tokenizer, initializer_range=0.2)
    for name, part in (("train", rows[:16]), ("held", rows[16:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    return folder


@pytest.fixture
def make_run(base: Path, tmp_path: Path) -> MakeRun:
    """Make a run's folder: an adapter with the given settings, or full weights."""

    def make(
        *, full: bool = False, model: Path | None = None, record: dict[str, Any] | None = None, **lora: Any
    ) -> Path:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = model or base / "base"
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        torch.manual_seed(3)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source)
        if not full:
            settings: dict[str, Any] = {
                "r": 4,
                "target_modules": ["q_proj", "v_proj", "down_proj"],
                "task_type": "CAUSAL_LM",
            } | lora
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded = get_peft_model(loaded, LoraConfig(**settings))
        with torch.no_grad():
            for name, parameter in loaded.named_parameters():
                if full or any(part in name for part in ("lora_B", "magnitude", "modules_to_save", "embedding_A")):
                    parameter.add_(0.05 * torch.randn_like(parameter))
        with warnings.catch_warnings():
            # PEFT tells that embeddings are saved with their adapter.
            warnings.simplefilter("ignore")
            loaded.save_pretrained(run)
        AutoTokenizer.from_pretrained(source).save_pretrained(run)
        kept = {"model": {"model_name_or_path": {"value": str(source)}}}
        found = {"format": 1, "command": ["preftune", "dpo"], "settings": kept, "data": {}} | (record or {})
        (run / "provenance.json").write_text(json.dumps(found), encoding="utf-8")
        return run

    return make
