"""Every key of the published recipes is accepted: as a field of today, or translated, and then said once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from preftune import ConfigError, DPOConfig, SFTConfig
from preftune.config import Resolved, resolve
from preftune.config.fields import fields_of, fields_of_all
from preftune.config.legacy import TABLE
from preftune.config.model import ModelConfig
from preftune.config.script import ScriptConfig

pytestmark = pytest.mark.filterwarnings("ignore:pad_to_multiple_of has no effect")

# Keys and kinds of values of alignment-handbook's recipes, by the years in which they were in use.
HANDBOOK_2023 = {
    "model_name_or_path": "a/b",
    "torch_dtype": "float32",
    "use_flash_attention_2": True,
    "trust_remote_code": True,
    "use_peft": True,
    "load_in_4bit": True,
    "lora_r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "k_proj"],
    "lora_modules_to_save": None,
    "dataset_mixer": {"a/b": 1.0},
    "dataset_splits": ["train_prefs", "test_prefs"],
    "dataset_configs": ["tiny"],
    "preprocessing_num_workers": 12,
    "bf16": True,
    "beta": 0.01,
    "do_eval": True,
    "evaluation_strategy": "steps",
    "eval_steps": 100,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "hub_model_id": "x",
    "hub_model_revision": "v1",
    "hub_private_repo": True,
    "hub_strategy": "every_save",
    "learning_rate": "5.0e-6",
    "log_level": "info",
    "logging_steps": 10,
    "logging_strategy": "steps",
    "loss_type": "sigmoid",
    "lr_scheduler_type": "cosine",
    "max_length": 1024,
    "max_prompt_length": 512,
    "max_steps": -1,
    "num_train_epochs": 1,
    "optim": "adamw_torch",
    "output_dir": "data/x",
    "overwrite_output_dir": True,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "push_to_hub": False,
    "remove_unused_columns": True,
    "report_to": ["tensorboard"],
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 42,
    "truncation_side": "left",
    "warmup_ratio": 0.1,
}
HANDBOOK_2025_DPO = {
    "model_name_or_path": "a/b",
    "model_revision": "it-SFT",
    "torch_dtype": "bfloat16",
    "attn_implementation": "flash_attention_2",
    "trust_remote_code": True,
    "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
    "dataset_mixture": {
        "datasets": [{"id": "a/b", "config": "P", "split": "train", "columns": ["chosen", "rejected"], "weight": 0.5}],
        "test_split_size": 2000,
        "seed": 0,
    },
    "dataset_num_proc": 12,
    "eval_strategy": "no",
    "do_eval": False,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "max_grad_norm": 0.2,
    "loss_type": "apo_zero",
    "beta": 0.05,
    "max_length": 24576,
    "padding_free": True,
    "run_name": "x",
    "save_steps": 0.5,
    "use_liger_kernel": False,
    "warmup_ratio": 0.1,
    "overwrite_output_dir": True,
    "average_tokens_across_devices": True,
    "ddp_timeout": 18000,
}
HANDBOOK_SFT = {
    "model_name_or_path": "a/b",
    "dataset_name": "c/d",
    "dataset_train_split": "train",
    "text_column": "content",
    "auto_insert_empty_system_msg": False,
    "torch_dtype": "auto",
    "max_seq_length": 2048,
    "packing": True,
    "packing_strategy": "bfd",
    "eos_token": "<|im_end|>",
    "assistant_only_loss": True,
    "completion_only_loss": False,
    "neftune_noise_alpha": 5,
    "warmup_ratio": 0.03,
    "logging_first_step": True,
    "save_strategy": "epoch",
    "hub_model_revision": "main",
    "push_to_hub_revision": False,
}
TRL_OLD = {
    "model_name_or_path": "a/b",
    "dataset_name": "c/d",
    "label_pad_token_id": -100,
    "padding_value": 0,
    "is_encoder_decoder": False,
    "generate_during_eval": False,
    "reference_free": False,
    "force_use_ref_model": False,
    "max_target_length": None,
    "max_completion_length": None,
    "rpo_alpha": None,
    "use_logits_to_keep": True,
    "precompute_ref_log_probs": True,
    "dataset_num_proc": 2,
    "sync_ref_model": False,
    "disable_dropout": True,
    "gradient_checkpointing_use_reentrant": False,
    "group_by_length": False,
    "save_safetensors": True,
    "logging_dir": "x",
    "no_cuda": True,
    "fp16_backend": "auto",
    "include_inputs_for_metrics": False,
    "logging_nan_inf_filter": True,
    "log_completions": False,
    "ignore_bias_buffers": False,
    "dataset_streaming": False,
    "per_gpu_train_batch_size": 2,
    "adafactor": False,
}


def from_file(tmp_path: Path, keys: dict[str, Any], config: type[Any]) -> Resolved[Any]:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(keys), encoding="utf-8")
    cpu = [] if "no_cuda" in keys else ["--use_cpu"]
    return resolve(["--config", str(file), *cpu], config)


@pytest.mark.parametrize(
    ("keys", "config"),
    [(HANDBOOK_2023, DPOConfig), (HANDBOOK_2025_DPO, DPOConfig), (HANDBOOK_SFT, SFTConfig), (TRL_OLD, DPOConfig)],
    ids=["handbook-2023", "handbook-2025", "handbook-sft", "trl-old"],
)
def test_recipes_are_accepted_and_each_translation_said_once(
    tmp_path: Path, keys: dict[str, Any], config: type[Any]
) -> None:
    found = from_file(tmp_path, keys, config)
    fields = fields_of_all({"s": ScriptConfig, "m": ModelConfig, "t": config})
    for old in keys:
        assert sum(note.startswith(old) for note in found.notes) == (old not in fields), old
    assert found.model.model_name_or_path == "a/b"


def test_values_arrive_under_their_new_names(tmp_path: Path) -> None:
    found = from_file(tmp_path, HANDBOOK_2023, DPOConfig)
    args = found.trainer
    assert found.model.dtype == "float32"
    assert found.model.attn_implementation == "flash_attention_2"
    assert found.script.dataset_config == "tiny"
    assert args.warmup_steps == 0.1
    assert args.eval_strategy == "steps"
    assert args.hub_revision == "v1"
    assert args.dataset_num_proc == 12
    assert args.truncation_mode == "keep_end"
    assert str(found.origins["warmup_steps"]).endswith("(written as warmup_ratio)")
    sft = from_file(tmp_path, HANDBOOK_SFT, SFTConfig).trainer
    assert (sft.max_length, sft.dataset_text_field) == (2048, "content")
    old = from_file(tmp_path, TRL_OLD, DPOConfig).trainer
    assert (old.use_cpu, old.per_device_train_batch_size) == (True, 2)
    assert old.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_old_names_work_as_flags_too() -> None:
    found = resolve(["--no_cuda", "--group_by_length", "--warmup_ratio", "0.2", "--overwrite_output_dir"], DPOConfig)
    assert found.trainer.use_cpu is True
    assert found.trainer.train_sampling_strategy == "group_by_length"
    assert found.trainer.warmup_steps == 0.2
    assert len(found.notes) == 4


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("rpo_alpha", 0.005, "loss_weights"),
        ("reference_free", True, "reference-free loss_type"),
        ("warmup_ratio", 1.5, "warmup_steps"),
        ("truncation_side", "middle", "left or right"),
        ("dataset_configs", ["a", "b"], "dataset_mixture"),
        ("max_completion_length", 10, "max_length"),
        ("env", {"LD_PRELOAD": "x"}, "shell"),
        ("past_index", 1, "no decoder model"),
        ("fsdp_min_num_params", 5, "fsdp_config"),
        ("log_completions", True, "generate"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_remedy(tmp_path: Path, key: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_file(tmp_path, {key: value}, DPOConfig)
    line = str(caught.value)
    assert key in line
    assert says in line
    assert "recipe.yaml:1" in line


def test_the_table_points_at_fields_that_exist() -> None:
    known = {name for cls in (ScriptConfig, ModelConfig, DPOConfig, SFTConfig) for name in fields_of(cls)}
    for row in TABLE.values():
        assert row.new is None or row.new in known, row.old
        assert row.old not in fields_of(DPOConfig), row.old
