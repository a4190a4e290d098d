"""Ways to train in several processes that would end late, or change a run unseen: refused before anything is loaded."""

from __future__ import annotations

import os
import warnings
from typing import Any

from accelerate import Accelerator

from preftune.errors import ConfigError
from preftune.training.config import PackedConfig
from preftune.training.zero import check_agreed, check_deepspeed, gather_zero3

_SIZES = ("tp_size", "cp_size", "sp_size", "dp_shard_size", "dp_replicate_size")


def check_engine(args: PackedConfig, model: Any = None) -> None:
    """Refuse what does not train right, whether settings or a launcher ask for it.

    Raises:
        ConfigError: Names the setting, and what to take instead.
    """
    _check_batches(args)
    _check_parallelism(args, model)
    _check_fsdp(args)
    check_deepspeed(args)
    check_agreed(args)


def _check_batches(args: PackedConfig) -> None:
    if args.world_size > 1 and getattr(args.accelerator_config, "split_batches", False):
        raise ConfigError(
            "a step is divided over the processes by tokens, and per_device_train_batch_size is that of one process",
            where="accelerator_config",
            value={"split_batches": True},
            remedy="leave split_batches out, and divide per_device_train_batch_size by the number of processes",
        )


def gather_when_saving(accelerator: Accelerator) -> None:
    """Let FSDP2 and ZeRO-3 save whole weights: sharded ones would leave no usable model in the output folder."""
    gather_zero3(accelerator)
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or "FULL" in str(plugin.state_dict_type):
        return
    if accelerator.is_main_process:
        said = f"checkpoints and the result are written whole, not as {plugin.state_dict_type.name}"
        warnings.warn(said, UserWarning, stacklevel=3)
    plugin.set_state_dict_type("FULL_STATE_DICT")


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


def _check_fsdp(args: PackedConfig) -> None:
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
    sparing = given.get("cpu_ram_efficient_loading", os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false"))
    if str(sparing).lower() in ("true", "1"):
        raise ConfigError(
            "leaves all processes but the first without weights when the reference is computed",
            where="fsdp_cpu_ram_efficient_loading",
            value=True,
            allowed="false",
            remedy="set it to false in fsdp_config, or for accelerate launch",
        )
