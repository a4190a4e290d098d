"""DeepSpeed's configuration of a run, wherever it comes from."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from preftune.errors import SetupError


def config_of(args: Any) -> dict[str, Any] | None:
    """DeepSpeed's configuration of a run, as settings or a launcher give it; ``None`` where it is not used."""
    found = getattr(args, "hf_deepspeed_config", None)
    plugin = getattr(args, "deepspeed_plugin", None)
    config: dict[str, Any] | None = None
    if found is not None:
        config = found.config
    elif plugin is not None:
        config = plugin.deepspeed_config
    return config


def zero_stage(args: Any) -> int | None:
    """DeepSpeed's ZeRO stage; ``None`` where DeepSpeed is not used."""
    config = config_of(args)
    return None if config is None else int((config.get("zero_optimization") or {}).get("stage", 0))


def is_zero3(args: Any) -> bool:
    """Whether DeepSpeed is going to shard parameters."""
    return zero_stage(args) == 3


def load_whole(args: Any) -> None:
    """Let ``from_pretrained`` load whole models, although the settings ask for ZeRO-3; they are sharded later."""
    if is_zero3(args):
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def check_installed(args: Any) -> None:
    """Say in one line that DeepSpeed is missing.

    Raises:
        SetupError: It is asked for.
    """
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1")
    if (args.deepspeed or launched) and importlib.util.find_spec("deepspeed") is None:
        raise SetupError(
            "DeepSpeed is not installed", where="deepspeed", remedy="run pip install 'preftune[deepspeed]'"
        )
