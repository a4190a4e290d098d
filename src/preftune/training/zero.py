"""DeepSpeed: what is refused, and what its ZeRO stages need beside what accelerate and transformers do.

Under ZeRO-3 a model is loaded whole, as under every other engine, and sharded when training begins: probe, key of the
reference and adapters then are those of one process. Meanwhile it takes its size in the main memory of each process.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from preftune.errors import ConfigError, ModelError, SetupError
from preftune.models.head import base_model, find_head
from preftune.references.parts import is_divided, remember_release
from preftune.training.batch import Batch
from preftune.training.config import PackedConfig
from preftune.training.zero_config import config_of, is_zero3

_GATHER = "stage3_gather_16bit_weights_on_model_save"
#: Sections of DeepSpeed's configuration that change what is trained, or how, beside what a step knows of.
_REFUSED = (
    *("amp", "autotuning", "compile", "compression_training", "curriculum_learning", "data_efficiency"),
    *("elasticity", "expert_parallel", "hybrid_engine", "pipeline", "progressive_layer_drop", "quantize_training"),
    *("sparse_attention", "torch_autocast", "zenflow"),
)
#: Settings of ``zero_optimization``, and what they may be.
_OF_ZERO: dict[str, tuple[Any, ...]] = {
    "zero_hpz_partition_size": (None, 1),
    "zero_quantized_weights": (None, False),
    "zero_quantized_nontrainable_weights": (None, False),
    "zero_quantized_gradients": (None, False),
    "mics_shard_size": (None, -1),
    "stage3_module_granularity_threshold": (None, 0),
    "leaf_module": (None,),
    "zenflow": (None,),
}
#: Optimizers that DeepSpeed's own for the CPU computes as well.
_ON_CPU = ("adamw_torch", "adamw_torch_fused")


def check_deepspeed(args: PackedConfig) -> None:
    """Refuse what does not train right.

    Raises:
        ConfigError: Names the setting, and what to take instead.
        SetupError: An optimizer on the CPU is asked for and cannot be compiled.
    """
    config = config_of(args)
    if config is None:
        return
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise _refused("zero_optimization.stage", stage, "1, 2, 3", "run without DeepSpeed to shard nothing")
    for name in _REFUSED:
        section = config.get(name)
        if section and not (isinstance(section, dict) and not section.get("enabled", True)):
            raise _refused(name, section, None, f"leave {name} out")
    sizes = {"tensor_parallel": ("autotp_size", "tp_size"), "sequence_parallel_size": ()}
    for name, parts in sizes.items():
        section = config.get(name) or 1
        found = [section.get(part) or 1 for part in parts] if isinstance(section, dict) else [section]
        if max(found, default=1) > 1:
            raise _refused(name, section, "1", f"leave {name} out")
    if config.get("managed_gradient_accumulation") is False:
        raise _refused("managed_gradient_accumulation", False, "true", "leave it out")
    for name, setting in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
        if config.get(name):
            raise _refused(name, config[name], None, f"leave {name} out, and set {setting} and its settings")
    for name, allowed in _OF_ZERO.items():
        if zero.get(name) not in allowed:
            raise _refused(f"zero_optimization.{name}", zero[name], str(allowed[-1]), f"leave {name} out")
    _check_offload(args, config, zero, stage)
    if stage == 3:
        _check_zero3(args)


def _refused(where: str, value: Any, allowed: str | None, remedy: str) -> ConfigError:
    return ConfigError("is not supported", where=f"deepspeed: {where}", value=value, allowed=allowed, remedy=remedy)


def _check_offload(args: PackedConfig, config: dict[str, Any], zero: dict[str, Any], stage: int) -> None:
    devices = {}
    for name in ("offload_optimizer", "offload_param"):
        section = zero.get(name) or {}
        device = devices[name] = str(section.get("device") or "none").rpartition(".")[2]
        if device not in ("none", "cpu"):
            raise _refused(f"zero_optimization.{name}.device", device, "none, cpu", "take cpu")
        if device == "cpu" and float(section.get("ratio", 1.0)) != 1.0:
            raise _refused(f"zero_optimization.{name}.ratio", section["ratio"], "1.0", "leave ratio out")
    if devices["offload_param"] == "cpu" and stage != 3:
        raise _refused("zero_optimization.offload_param.device", "cpu", "none", "take stage 3 to offload parameters")
    if devices["offload_optimizer"] != "cpu" or config.get("zero_force_ds_cpu_optimizer") is False:
        return
    name = str(getattr(args.optim, "value", args.optim))
    if name not in _ON_CPU:
        # accelerate would put Adam in its place.
        raise ConfigError(
            "DeepSpeed has no such optimizer on the CPU",
            where="optim",
            value=name,
            allowed=", ".join(_ON_CPU),
            remedy="take one of these, or set zero_force_ds_cpu_optimizer: false to run torch's own on the CPU",
        )
    from deepspeed.ops.op_builder import CPUAdamBuilder

    try:
        CPUAdamBuilder().load(verbose=False)
    except Exception as error:  # whatever a compiler, or its absence, may raise
        raise SetupError(
            f"DeepSpeed's optimizer for the CPU cannot be compiled ({str(error).strip().splitlines()[0][:200]})",
            where="deepspeed: zero_optimization.offload_optimizer.device",
            value="cpu",
            remedy="install a C++ compiler and ninja, or set zero_force_ds_cpu_optimizer: false to run torch's own",
        ) from error


def _check_zero3(args: PackedConfig) -> None:
    for name in ("torch_compile", "activation_offloading", "save_on_each_node"):
        if getattr(args, name):
            raise ConfigError(
                "is not supported with ZeRO-3",
                where=name,
                value=getattr(args, name),
                remedy=f"leave {name} out, or take stage 2",
            )


def check_zero_model(args: PackedConfig, model: Any) -> None:
    """Refuse a policy that ZeRO-3 does not train right.

    Raises:
        ModelError: Says what it has.
    """
    if not is_zero3(args):
        return
    why, remedy = None, "take stage 2, or FSDP2 (fsdp: true)"
    if any(map(is_divided, model.parameters())):
        why = "it was loaded in shards"
        remedy = "pass it by name, or load it after the settings are made, so that it is sharded when training begins"
    elif getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        why = "its weights are quantised"
    elif hasattr(base_model(model).config.get_text_config(), "output_router_logits"):
        why = "it has experts, which not every process visits alike"
    elif any(getattr(config, "use_dora", False) for config in (getattr(model, "peft_config", None) or {}).values()):
        why = "its adapter is a DoRA, which reads the weights under it"
    elif any(len(getattr(module, "lora_embedding_A", ())) for module in model.modules()):
        why = "its adapter changes embeddings"
    if why is not None:
        raise ModelError(f"it cannot be trained with ZeRO-3: {why}", where="model", remedy=remedy)


def check_agreed(args: PackedConfig) -> None:
    """Refuse numbers of DeepSpeed's configuration that are not the settings' own, in one line.

    Raises:
        ConfigError: Names them.
    """
    found = getattr(getattr(args, "deepspeed_plugin", None), "hf_ds_config", None)
    different = getattr(found, "mismatches", None)
    if different:
        said = "; ".join(str(each).removeprefix("- ds ").replace(" vs hf ", ", and the run has ") for each in different)
        raise ConfigError(f"the configuration has {said}", where="deepspeed", remedy="set these to auto")


def gather_zero3(accelerator: Any) -> None:
    """Let ZeRO-3 save whole weights: otherwise no usable model would be in the output folder."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    zero = None if plugin is None else plugin.deepspeed_config.get("zero_optimization")
    if not zero or zero.get("stage") != 3:
        return
    zero[_GATHER] = True


def shard(trainer: Any, max_steps: int) -> None:
    """Divide a whole model's parameters, one after another, so that no device ever holds all of it.

    Args:
        trainer: Whose model it is.
        max_steps: Optimizer steps, for DeepSpeed's configuration.
    """
    args, model = trainer.args, trainer.model
    if any(map(is_divided, model.parameters())):
        return
    found = trainer.accelerator.state.deepspeed_plugin.hf_ds_config
    found.trainer_config_finalize(args, model, max_steps)
    # Counted while the parameters can be.
    trainer.step.flops(Batch())
    _divide(model, found, args.device)


def shard_as(policy: nn.Module, model: nn.Module, accelerator: Any) -> None:
    """Divide a model that runs beside the policy, where the policy is divided.

    Args:
        policy: The policy.
        model: A model, whole or divided already.
        accelerator: Accelerate's.
    """
    if not any(map(is_divided, policy.parameters())) or any(map(is_divided, model.parameters())):
        return
    import deepspeed

    found = accelerator.state.deepspeed_plugin.hf_ds_config
    _divide(model, found, accelerator.device)
    config = copy.deepcopy(found.config)
    # Nothing of it is trained.
    config["zero_optimization"].pop("offload_optimizer", None)
    attend_to(deepspeed.initialize(model=model, config=config)[0])


def _divide(model: nn.Module, found: Any, device: torch.device) -> None:
    import deepspeed

    dtype = found.dtype()
    if dtype != torch.float32:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    deepspeed.init_distributed(auto_mpi_discovery=False)
    deepspeed.zero.Init(module=model, config_dict_or_path=copy.deepcopy(found.config))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def attend_to(engine: Any) -> None:
    """Let DeepSpeed gather what is read beside a module's own weights, and let it be told to release all of it."""
    import deepspeed

    model: nn.Module = engine.module
    head = find_head(model)
    own = {id(p) for p in head.parameters(recurse=False)}
    for parameter in head.parameters():
        # Those of an adapter on the head.
        if id(parameter) not in own:
            deepspeed.zero.register_external_parameter(head, parameter)
    remember_release(model, engine.optimizer.empty_partition_cache)
