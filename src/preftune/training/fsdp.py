"""What a run under FSDP2 has different from what accelerate makes of it by default."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import TrainingArguments

from preftune.errors import ConfigError

_SPARING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def load_everywhere(args: TrainingArguments) -> None:
    """Let every process load the weights: all of them try the model, and know the reference by its content.

    Args:
        args: Settings, which are changed to say so; the environment of a launcher is changed too.
    """
    given: dict[str, Any] = getattr(args, "fsdp_plugin_args", None) or {}
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not given and not launched:
        return
    asked = given.get("cpu_ram_efficient_loading", False) or os.environ.get(_SPARING, "false").lower() in ("true", "1")
    if not asked:
        return
    if "cpu_ram_efficient_loading" in given:
        given["cpu_ram_efficient_loading"] = False
    # transformers looks here when it loads a model.
    os.environ[_SPARING] = "false"
    if args.process_index == 0:
        said = "fsdp_cpu_ram_efficient_loading has no effect: every process loads the whole model into main memory"
        warnings.warn(said, UserWarning, stacklevel=4)


def settle(accelerator: Accelerator, model: nn.Module) -> None:
    """Let FSDP2 save whole weights, and add up gradients in fp32.

    Sharded weights would leave no usable model in the output folder. accelerate's policy adds up gradients in half
    precision, over rows as well as over processes, where small ones are lost.

    Args:
        accelerator: Accelerate's, whose plugin is changed.
        model: What will be trained.

    Raises:
        ConfigError: 4-bit weights are packed into numbers of a precision that the gathering would change.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if "FULL" not in str(plugin.state_dict_type):
        _say(accelerator, f"checkpoints and the result are written whole, not as {plugin.state_dict_type.name}")
        plugin.set_state_dict_type("FULL_STATE_DICT")
    if accelerator.mixed_precision == "no":
        return
    half = torch.float16 if accelerator.mixed_precision == "fp16" else torch.bfloat16
    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    packed = {p.dtype for p in model.parameters() if type(p).__name__ == "Params4bit" and p.is_floating_point()}
    if packed - {half}:
        raise ConfigError(
            "numbers that stand for packed 4-bit weights would be rounded",
            where="bnb_4bit_quant_storage",
            value=str(packed.pop()).removeprefix("torch."),
            allowed=f"{str(half).removeprefix('torch.')}, or uint8, with which every process keeps them whole",
        )
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    # accelerate leaves adapters of 4-bit weights as they are.
    quantised = any(type(p).__name__ == "Params4bit" for p in model.parameters())
    if trained & {torch.float16, torch.bfloat16} and not quantised:
        _say(
            accelerator,
            "half-precision weights are trained and saved in fp32: FSDP2 with mixed precision keeps them so",
        )


def _say(accelerator: Accelerator, what: str) -> None:
    if accelerator.is_main_process:
        warnings.warn(what, UserWarning, stacklevel=4)


def rounding(policy: nn.Module, accelerator: Accelerator) -> str:
    """How a sharded policy's arithmetic differs from a whole one's, or nothing.

    With mixed precision FSDP2 rounds all weights of a layer, and autocast those of its matrix products.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if not isinstance(policy, FSDPModule) or plugin is None or accelerator.mixed_precision == "no":
        return ""
    return f"all weights in {plugin.mixed_precision_policy.param_dtype}"


def shard_as(policy: nn.Module, model: nn.Module, accelerator: Accelerator) -> None:
    """Shard a model that runs beside the policy, where the policy is sharded.

    Args:
        policy: The policy.
        model: A model, whole or sharded already.
        accelerator: Accelerate's.
    """
    if not isinstance(policy, FSDPModule) or isinstance(model, FSDPModule):
        return
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin: Any = accelerator.state.fsdp_plugin
    known = {type(module).__name__ for module in model.modules()}
    names = plugin.transformer_cls_names_to_wrap
    # Layers of another architecture have names of their own.
    plugin.transformer_cls_names_to_wrap = names if names and set(names) <= known else None
    try:
        fsdp2_prepare_model(accelerator, model)
    finally:
        plugin.transformer_cls_names_to_wrap = names
