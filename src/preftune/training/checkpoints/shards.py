"""Checkpoints of a model that FSDP2 shards are those of one process: any number of processes can go on from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from preftune.errors import TrainingError
from preftune.training.checkpoints.trees import load_tree

#: Whole tensors, on the first process alone.
_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors")


def whole_optimizer(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """An optimizer's state as one process would have it; empty on all processes but the first.

    Args:
        model: The sharded model.
        optimizer: Its optimizer; every process has to ask.
    """
    named: Any = get_optimizer_state_dict(model, _inner(optimizer), options=_GATHERED)
    if not named:
        return {}
    number_of = {name: number for number, name in enumerate(_names(named))}
    groups = [{**each, "params": [number_of[name] for name in each["params"]]} for each in named["param_groups"]]
    return {"state": {number_of[name]: each for name, each in named["state"].items()}, "param_groups": groups}


def load_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Put an optimizer's state back, each process its shard."""
    # Without gathering anything: the names are the same everywhere.
    names = _names(get_optimizer_state_dict(model, _inner(optimizer)))
    named: dict[str, Any] = {}
    if _is_first():
        kept = load_tree(folder, "optimizer")
        groups = [{**each, "params": [names[number] for number in each["params"]]} for each in kept["param_groups"]]
        named = {"state": {names[number]: each for number, each in kept["state"].items()}, "param_groups": groups}
    set_optimizer_state_dict(model, _inner(optimizer), named, options=_SPREAD)


def load_model(model: nn.Module, folder: Path) -> None:
    """Put the weights of a checkpoint into a sharded model, each process its shard.

    Raises:
        TrainingError: The checkpoint does not hold all that is trained.
    """
    values: dict[str, Any] = {}
    if _is_first():
        kept = _read(folder)
        for name, names in _saved_names(model).items():
            values |= dict.fromkeys(names, kept[name]) if name in kept else {}
        missing = [name for name, p in model.named_parameters() if p.requires_grad and name not in values]
        if missing:
            raise TrainingError("the checkpoint does not hold all weights", where=str(folder), value=missing[0])
    set_model_state_dict(model, values, options=_SPREAD)


def _saved_names(model: Any) -> dict[str, list[str]]:
    """Names in a file of weights, and those of the model's parameters that are stored there, tied ones together."""
    shared: dict[int, list[str]] = {}
    values: dict[str, Any] = {}
    for name, value in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        shared.setdefault(id(value), []).append(name)
        values[name] = value
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        values = get_peft_model_state_dict(model, values, model.active_adapters[0])
    return {name: shared[id(value)] for name, value in values.items()}


def _read(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    names = list(_WEIGHTS)
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found: dict[str, Tensor] = {}
    for name in names:
        if (folder / name).exists():
            found |= load_file(folder / name)
    return found


def _names(state: Any) -> list[str]:
    return [name for group in state["param_groups"] for name in group["params"]]


def _inner(optimizer: Any) -> Any:
    """The optimizer under accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _is_first() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
