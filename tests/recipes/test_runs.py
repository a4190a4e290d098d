"""Every recipe trains two steps on a tiny model and local rows shaped like its own."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest

from preftune.recipes import RECIPES, Recipe

from .conftest import Cli, config_of

# What no laptop has: the model, the data, their size, half precision, quantisation and its optimizers.
SMALL = {
    "max_length": "128",
    "max_prompt_length": "64",
    "per_device_train_batch_size": "2",
    "gradient_accumulation_steps": "2",
    "dtype": "float32",
    "bf16": "false",
    "load_in_4bit": "false",
    "optim": "adamw_torch",
    "max_steps": "2",
    "logging_steps": "1",
    "eval_strategy": "no",
    "save_strategy": "no",
    "output_dir": "out",
}

# Loss of the first step, where policy and reference agree: what the formula gives for equal log-probs; the weight of
# the SFT term, which is about the logarithm of the vocabulary, 300, for a model that knows nothing; and how far the
# loss may be from that. An untrained model's mean log-probs are within 0.1 of each other and of the uniform guess;
# where no log-prob of the policy alone enters, the four digits of the log are all there is.
LN2 = math.log(2)
FIRST_LOSS = {
    "zephyr-7b-dpo-full": (LN2, 0.0, 1e-4),
    "zephyr-7b-dpo-qlora": (LN2, 0.0, 1e-4),
    "zephyr-gemma-dpo": (LN2, 0.0, 1e-4),
    "zephyr-7b-sft-full": (0.0, 1.0, 0.1),
    "laptop-dpo": (LN2, 0.0, 1e-4),
    "smollm2-dpo": (LN2, 0.0, 1e-4),
    "smollm3-apo-zero": (1.0, 0.0, 1e-4),
    "tulu3-dpo-norm": (LN2, 0.0, 1e-4),
    "mpo": (0.8 * LN2 + 0.2 * 2 * LN2, 1.0, 0.1),
    "rpo": (LN2, 0.2, 0.2 * 0.1),
    "zephyr-141b-orpo": (0.05 * LN2, 1.0, 0.1),
    "simpo-llama3": (math.log1p(math.exp(1.375)), 0.0, 2.5 * 0.1),
    "kto": (0.5, 0.0, 1e-4),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_two_steps(recipe: Recipe, world: Path, cli: Cli) -> None:
    names = {item.name for item in fields(config_of(recipe.verb))}
    rows = str(world / {"kto": "answers.jsonl", "sft": "chats.jsonl"}.get(recipe.verb, "pairs.jsonl"))
    if "dataset_mixture" in recipe.text():
        mixture = {"datasets": [{"id": rows, "columns": ["chosen", "rejected"], "weight": 0.75}]}
        data = ["--dataset_mixture", json.dumps(mixture)]
    else:
        # Names of splits and columns in the file belong to its own data, and are left out.
        data = ["--dataset_name", rows]
    small = [
        part
        for name, value in SMALL.items()
        if name != "max_prompt_length" or name in names
        for part in (f"--{name}", value)
    ]
    assert cli("recipes", "copy", recipe.name)[0] == 0
    model = ["--model_name_or_path", str(world / "model"), "--model_revision", "main"]
    code, out, err = cli(recipe.verb, "--config", recipe.file_name, *model, *data, *small)
    assert code == 0, err
    assert "step 2/2" in out
    state = json.loads(Path("out/trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 2
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    constant, sft_weight, slack = FIRST_LOSS[recipe.name]
    assert losses[0] == pytest.approx(constant + sft_weight * math.log(300), abs=slack)
    saved = "adapter_model.safetensors" if "use_peft: true" in recipe.text() else "model.safetensors"
    assert Path("out", saved).exists()
    settings = json.loads(Path("out/provenance.json").read_text(encoding="utf-8"))["settings"]["trainer"]
    for name in ("beta", "learning_rate", "lr_scheduler_type", "warmup_steps"):
        if name == "beta" and recipe.verb == "sft":
            continue
        assert settings[name]["from"].startswith(f"file {recipe.file_name}:"), name
    if len(recipe.method) > 1:
        assert settings["loss_weights"]["from"].startswith("file ")
