"""Names of the settings in the recipes and command lines that others have published, with neutral values.

Names only, as they stand in alignment-handbook (2023 to 2025) and in TRL's examples and scripts (0.8 to 1.16).
"""

from __future__ import annotations

from typing import Any

# One value for each name, of the kind that it has there.
VALUES: dict[str, Any] = {
    # Model, tokenizer, adapter.
    "model_name_or_path": "a/b",
    "model_revision": "main",
    "tokenizer_name_or_path": "a/b",
    "torch_dtype": "float32",
    "dtype": "float32",
    "attn_implementation": "sdpa",
    "use_flash_attention_2": True,
    "trust_remote_code": False,
    "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
    "eos_token": "</s>",
    "use_peft": True,
    "load_in_4bit": True,
    "lora_r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "lora_target_modules": ["q_proj", "v_proj"],
    # Data.
    "dataset_name": "c/d",
    "dataset_config": "e",
    "dataset_configs": ["e"],
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    "dataset_mixer": {"c/d": 1.0},
    "dataset_splits": ["train", "test"],
    "dataset_mixture": {"datasets": [{"id": "c/d", "split": "train", "weight": 0.5}], "seed": 0},
    "datasets": [{"path": "c/d", "name": "e", "split": "train", "columns": ["chosen", "rejected"]}],
    "test_split_size": 0.1,
    "dataset_num_proc": 2,
    "preprocessing_num_workers": 2,
    "dataset_kwargs": {"skip_prepare_dataset": False},
    "max_length": 64,
    "max_seq_length": 64,
    "max_prompt_length": 32,
    "packing": True,
    "packing_strategy": "bfd",
    "padding_free": True,
    # Objective.
    "beta": 0.2,
    "loss_type": "sigmoid",
    "assistant_only_loss": True,
    # Trainer.
    "average_tokens_across_devices": True,
    "bf16": True,
    "ddp_timeout": 100,
    "do_eval": True,
    "do_train": True,
    "eval_steps": 10,
    "eval_strategy": "steps",
    "evaluation_strategy": "steps",
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "hub_model_id": "f",
    "hub_model_revision": "v1",
    "hub_private_repo": True,
    "hub_strategy": "every_save",
    "learning_rate": "5.0e-7",
    "log_level": "info",
    "logging_first_step": True,
    "logging_steps": 5,
    "logging_strategy": "steps",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "lr_scheduler_type": "cosine_with_min_lr",
    "max_grad_norm": 0.2,
    "max_steps": -1,
    "num_train_epochs": 1,
    "optim": "adamw_torch",
    "output_dir": "out",
    "overwrite_output_dir": True,
    "per_device_eval_batch_size": 2,
    "per_device_train_batch_size": 2,
    "push_to_hub": False,
    "push_to_hub_revision": False,
    "remove_unused_columns": False,
    "report_to": "none",
    "run_name": "g",
    "save_steps": 10,
    "save_strategy": "steps",
    "save_total_limit": 1,
    "seed": 42,
    "use_liger_kernel": False,
    "warmup_ratio": 0.1,
    "warmup_steps": 10,
}

# In every recipe of the handbook.
_BASE = (
    "model_name_or_path torch_dtype bf16 gradient_accumulation_steps gradient_checkpointing learning_rate "
    "logging_steps lr_scheduler_type num_train_epochs output_dir per_device_train_batch_size save_strategy seed"
)
_REENTRANT = "gradient_checkpointing_kwargs"
_MIXER = "dataset_mixer dataset_splits preprocessing_num_workers"
_MIXTURE = "dataset_mixture dataset_num_proc"
_EVAL = "do_eval eval_strategy"
_EVAL_OLD = "do_eval evaluation_strategy"
_EVALUATES = "eval_steps per_device_eval_batch_size"
_HUB = "hub_model_id push_to_hub"
_DPO = f"{_HUB} {_EVALUATES} log_level beta max_length max_prompt_length optim warmup_ratio"
_SAVES = "save_steps save_total_limit"
_LORA = "use_peft lora_r lora_alpha lora_dropout lora_target_modules"
_SFT = f"{_REENTRANT} model_revision hub_strategy log_level logging_strategy push_to_hub overwrite_output_dir report_to"
_SFT_RUN = f"{_SFT} hub_model_id max_steps per_device_eval_batch_size"
_SMOLLM3 = (
    "attn_implementation trust_remote_code dataset_mixture dataset_num_proc run_name lr_scheduler_kwargs max_grad_norm "
    "max_length use_liger_kernel warmup_ratio save_total_limit do_eval eval_strategy"
)
_ORPO = (
    f"{_REENTRANT} {_HUB} model_revision chat_template beta log_level max_length max_prompt_length optim report_to "
    "warmup_steps"
)

# Recipe -> (verb, names). `old` and `new` are the two ages of one file, before and after `dataset_mixture`.
HANDBOOK: dict[str, tuple[str, str]] = {
    "zephyr-7b-beta/dpo/full, old": ("dpo", f"{_BASE} {_REENTRANT} {_MIXER} {_EVAL_OLD} {_DPO} {_SAVES}"),
    "zephyr-7b-beta/dpo/full, new": ("dpo", f"{_BASE} {_REENTRANT} {_MIXTURE} {_EVAL} {_DPO} {_SAVES}"),
    "zephyr-7b-beta/dpo/lora": (
        "dpo",
        f"{_BASE} {_REENTRANT} {_MIXER} {_EVAL_OLD} {_DPO} {_LORA} save_total_limit",
    ),
    "zephyr-7b-beta/dpo/qlora, old": (
        "dpo",
        f"{_BASE} {_REENTRANT} {_MIXER} {_EVAL_OLD} {_DPO} {_LORA} {_SAVES} load_in_4bit",
    ),
    "zephyr-7b-beta/dpo/qlora, new": (
        "dpo",
        f"{_BASE} {_REENTRANT} {_MIXER} {_EVAL} {_DPO} {_LORA} {_SAVES} load_in_4bit attn_implementation",
    ),
    "zephyr-7b-gemma/dpo, old": ("dpo", f"{_BASE} {_REENTRANT} {_MIXER} {_EVAL_OLD} {_DPO} report_to"),
    "zephyr-7b-gemma/dpo, new": ("dpo", f"{_BASE} {_REENTRANT} {_MIXTURE} {_EVAL} {_DPO} report_to"),
    "starchat2-15b/dpo": ("dpo", f"{_BASE} {_REENTRANT} {_MIXTURE} {_EVAL} {_DPO} report_to"),
    "smollm2/dpo": ("dpo", f"{_BASE} {_REENTRANT} {_MIXTURE} {_EVAL} {_DPO} report_to hub_private_repo"),
    "smollm2/dpo/smol": ("dpo", f"{_BASE} {_REENTRANT} {_MIXER} {_EVAL} {_DPO} report_to hub_private_repo"),
    "smollm3/dpo/apo": (
        "dpo",
        f"{_BASE} {_SFT} {_SMOLLM3} beta loss_type padding_free save_steps",
    ),
    "constitutional-ai/dpo": ("dpo", f"{_BASE} {_MIXER} {_EVAL_OLD} {_DPO} {_SAVES} do_train"),
    "gpt2-nl/dpo": ("dpo", f"{_BASE} {_REENTRANT} {_MIXER} {_EVAL_OLD} {_DPO} {_SAVES} model_revision report_to"),
    "pref_align_scan/dpo": (
        "dpo",
        f"{_BASE} {_REENTRANT} {_MIXER} {_EVAL_OLD} {_EVALUATES} {_SAVES} loss_type beta do_train hub_model_id "
        "hub_model_revision max_prompt_length optim push_to_hub_revision warmup_ratio",
    ),
    "zephyr-7b-beta/sft/full": (
        "sft",
        f"{_BASE} {_SFT_RUN} {_MIXTURE} {_EVAL} {_SAVES} attn_implementation chat_template max_seq_length "
        "remove_unused_columns warmup_ratio",
    ),
    "zephyr-7b-beta/sft/lora": (
        "sft",
        f"{_BASE} {_SFT_RUN} {_MIXER} {_EVAL_OLD} {_LORA} {_SAVES} chat_template max_seq_length",
    ),
    "zephyr-7b-beta/sft/qlora": (
        "sft",
        f"{_BASE} {_SFT_RUN} {_MIXTURE} {_EVAL} {_LORA} {_SAVES} attn_implementation load_in_4bit chat_template "
        "max_length warmup_ratio",
    ),
    "zephyr-7b-gemma/sft": (
        "sft",
        f"{_BASE} {_SFT_RUN} {_MIXER} {_EVAL_OLD} {_SAVES} tokenizer_name_or_path use_flash_attention_2 chat_template "
        "dataset_kwargs max_seq_length remove_unused_columns warmup_ratio",
    ),
    "smollm/sft": (
        "sft",
        f"{_BASE} {_SFT_RUN} {_MIXTURE} {_EVAL} attn_implementation chat_template dataset_kwargs max_length "
        "remove_unused_columns warmup_ratio",
    ),
    "smollm2/sft": (
        "sft",
        f"{_BASE} {_SFT_RUN} {_EVAL} attn_implementation chat_template dataset_name dataset_config dataset_train_split "
        "dataset_test_split dataset_num_proc max_length remove_unused_columns warmup_ratio",
    ),
    "smollm3/sft/mid": (
        "sft",
        f"{_BASE} {_SFT} {_SMOLLM3} chat_template eos_token ddp_timeout packing max_steps save_steps "
        "average_tokens_across_devices",
    ),
    "smollm3/sft": (
        "sft",
        f"{_BASE} {_SFT} {_SMOLLM3} chat_template eos_token ddp_timeout packing packing_strategy max_steps "
        "assistant_only_loss average_tokens_across_devices",
    ),
    "starchat2-15b/sft": (
        "sft",
        f"{_BASE} {_SFT_RUN} {_MIXTURE} {_EVAL} attn_implementation chat_template max_length remove_unused_columns "
        "warmup_ratio",
    ),
    "constitutional-ai/sft": (
        "sft",
        f"{_BASE} {_SFT_RUN} {_MIXTURE} {_EVAL} {_SAVES} attn_implementation chat_template do_train max_seq_length "
        "remove_unused_columns warmup_ratio",
    ),
    "gpt2-nl/cpt": (
        "sft",
        f"{_BASE} {_SFT_RUN} {_MIXER} {_EVAL} {_SAVES} dataset_configs max_seq_length remove_unused_columns "
        "warmup_ratio",
    ),
    "gpt2-nl/sft": (
        "sft",
        f"{_BASE} {_SFT_RUN} {_MIXER} {_EVAL_OLD} {_SAVES} chat_template max_seq_length remove_unused_columns "
        "warmup_ratio",
    ),
    "mistral-capybara/orpo": ("orpo", f"{_BASE} {_ORPO} {_MIXER} use_flash_attention_2"),
    "zephyr-141b-A35b/orpo/full": (
        "orpo",
        f"{_BASE} {_ORPO} attn_implementation dataset_name dataset_train_split dataset_num_proc",
    ),
    "zephyr-141b-A35b/orpo/qlora": (
        "orpo",
        f"{_BASE} {_ORPO} {_MIXER} {_LORA} load_in_4bit use_flash_attention_2 overwrite_output_dir",
    ),
}

_SCRIPT = (
    "model_name_or_path learning_rate per_device_train_batch_size gradient_accumulation_steps eval_steps output_dir "
    "use_peft lora_r lora_alpha"
)
_SCRIPT_2024 = (
    f"{_SCRIPT} max_steps logging_steps warmup_steps report_to bf16 logging_first_step remove_unused_columns optim"
)

TRL: dict[str, tuple[str, str]] = {
    "examples/cli_configs/example_config": (
        "sft",
        "model_name_or_path dataset_name report_to learning_rate lr_scheduler_type",
    ),
    "datasets of the command line": ("dpo", "model_name_or_path datasets test_split_size"),
    "scripts/dpo": ("dpo", f"{_SCRIPT} dataset_name num_train_epochs max_steps eval_strategy remove_unused_columns"),
    "scripts/sft": ("sft", f"{_SCRIPT} dataset_name num_train_epochs packing eos_token eval_strategy push_to_hub"),
    "scripts/kto": (
        "kto",
        f"{_SCRIPT} dataset_name num_train_epochs lr_scheduler_type warmup_steps logging_first_step load_in_4bit "
        "lora_target_modules",
    ),
    "scripts/kto, old": (
        "kto",
        f"{_SCRIPT} dataset_name num_train_epochs lr_scheduler_type warmup_ratio logging_first_step logging_steps bf16 "
        "report_to",
    ),
    "examples/scripts/cpo": ("cpo", _SCRIPT_2024),
    "examples/scripts/orpo": ("orpo", _SCRIPT_2024),
}
