"""Ways to train in several processes that would end late, or change a run unseen: refused before anything is loaded."""

from __future__ import annotations

import os
import warnings
from typing import Any

from accelerate import Accelerator
from torch import nn

from preftune.errors import ConfigError
from preftune.training import fsdp, zero
from preftune.training.config import PackedConfig
from preftune.training.zero import check_agreed, check_deepspeed, gather_zero3
from preftune.training.zero_config import load_whole

_SIZES = ("tp_size", "cp_size", "sp_size", "dp_shard_size", "dp_replicate_size")


def check_engine(args: PackedConfig, model: Any = None) -> None:
    """Refuse what does not train right, whether settings or a launcher ask for it.

    Raises:
        ConfigError: Names the setting, and what to take instead.
    """
    _check_batches(args)
    _check_parallelism(args, model)
    _check_fsdp(args, model)
    check_deepspeed(args)
    check_agreed(args)


def settle_engine(args: PackedConfig, accelerator: Accelerator, model: nn.Module) -> None:
    """Let the engine load, save and add up as a run of one process does, once accelerate knows which it is.

    Raises:
        ConfigError: DeepSpeed's configuration has numbers other than the settings'; 4-bit weights would be rounded.
    """
    # transformers has made the settings of DeepSpeed anew.
    load_whole(args)
    check_agreed(args)
    fsdp.settle(accelerator, model)
    gather_zero3(accelerator)
    _keep_order_of_sums(args, accelerator)


def _keep_order_of_sums(args: PackedConfig, accelerator: Accelerator) -> None:
    """Let DDP add gradients up in one order from the first step on: a run that goes on then gives the same bits.

    DDP lays its buckets out anew after the first backward, unless it looks for unused parameters, and with more than
    two processes the order of sums depends on the layout. Reentrant checkpointing does not allow it to look.
    """
    handler = accelerator.ddp_handler
    given = args.gradient_checkpointing_kwargs
    reentrant = isinstance(given, dict) and given.get("use_reentrant")
    if handler is None or accelerator.num_processes < 3 or handler.static_graph or reentrant:
        return
    if args.ddp_find_unused_parameters is None:
        handler.find_unused_parameters = True
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")


def shard_as(policy: nn.Module, model: nn.Module, accelerator: Accelerator) -> None:
    """Shard a model that runs beside the policy as the policy is, or leave both whole."""
    fsdp.shard_as(policy, model, accelerator)
    zero.shard_as(policy, model, accelerator)


def _check_batches(args: PackedConfig) -> None:
    if args.world_size > 1 and getattr(args.accelerator_config, "split_batches", False):
        raise ConfigError(
            "a step is divided over the processes by tokens, and per_device_train_batch_size is that of one process",
            where="accelerator_config",
            value={"split_batches": True},
            remedy="leave split_batches out, and divide per_device_train_batch_size by the number of processes",
        )


def _check_parallelism(args: PackedConfig, model: Any) -> None:
    remedy = "leave it out: FSDP2 (fsdp: true) shards a model over all processes"
    if args.parallelism_config is not None:
        what = "tensor, context and other parallelism within a model are not supported"
        raise ConfigError(what, where="parallelism_config", value=args.parallelism_config, remedy=remedy)
    for size in _SIZES:
        name = f"PARALLELISM_CONFIG_{size.upper()}"
        if int(os.environ.get(name) or "1") > 1:
            raise ConfigError("is not supported", where=name, value=os.environ[name], allowed="1", remedy=remedy)
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise ConfigError(
            "the model is loaded with tensor parallelism", where="model", remedy="load it without tp_plan"
        )
    kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    for name in ("tp_plan", "tp_size", "distributed_config"):
        if kwargs.get(name) is not None:
            raise ConfigError(f"{name} is not supported", where="model_init_kwargs", value=kwargs[name], remedy=remedy)


def _check_fsdp(args: PackedConfig, model: Any) -> None:
    given: dict[str, Any] = args.fsdp_plugin_args or {}
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not given and not launched:
        return
    version = int(given.get("fsdp_version") or os.environ.get("FSDP_VERSION") or "1")
    if version != 2:
        raise ConfigError(
            "FSDP1 is not supported",
            where="fsdp_config: version" if given else "FSDP_VERSION",
            value=version,
            allowed="2",
            remedy="set version: 2 in fsdp_config" if given else "set fsdp_version: 2 for accelerate launch",
        )
    if str(given.get("cpu_offload", os.environ.get("FSDP_OFFLOAD_PARAMS", "false"))).lower() in ("true", "1"):
        raise ConfigError(
            "weights in main memory are not supported under FSDP2",
            where="fsdp_config: cpu_offload" if given else "FSDP_OFFLOAD_PARAMS",
            value=True,
            allowed="false",
            remedy="leave it out, and save memory by more processes, gradient_checkpointing or activation_offloading",
        )
    if any(parameter.is_meta for parameter in getattr(model, "parameters", list)()):
        raise ConfigError(
            "the model was loaded without its weights in this process",
            where="fsdp_cpu_ram_efficient_loading",
            value=True,
            remedy="pass the model by name, or load it after the settings are made",
        )
