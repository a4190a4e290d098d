"""Several LoRA adapters over one frozen base, each on its own part of the row.

A row that holds the same pairs once per adapter runs through the base model in one piece: every matmul of the base sees
all parts at once, and the adapters' two small products are batched over the parts. Parts never see each other (they are
trees of their own), so that every adapter gets exactly the values and gradients that it gets alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from preftune.errors import ModelError
from preftune.kernels.device import put
from preftune.models.head import find_head


def add_copies(model: nn.Module, names: Sequence[str]) -> None:
    """Give a LoRA model further adapters that equal its present one, all of them trainable.

    Args:
        model: A PEFT model with one LoRA adapter, the active one. It stays the only active one.
        names: Names of the copies.

    Raises:
        ModelError: The adapter does more than add a product of two matrices to linear layers.
    """
    peft_model: Any = model
    source = peft_model.active_adapter
    config = peft_model.peft_config[source]
    _refuse_others(model, config)
    # What they are drawn with is overwritten, and must not move the order of the data.
    with torch.random.fork_rng():
        for name in names:
            peft_model.add_adapter(name, config)
    for layer in lora_layers(model):
        for name in names:
            for part in (layer.lora_A, layer.lora_B):
                part[name].weight.data.copy_(part[source].weight.data)
                part[name].weight.requires_grad_(True)


def lora_layers(model: nn.Module) -> list[Any]:
    """The layers that carry adapters."""
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def adapter_parameters(model: nn.Module, name: str) -> list[tuple[str, nn.Parameter]]:
    """Trainable parameters of one adapter, with their names."""
    return [(key, p) for key, p in model.named_parameters() if p.requires_grad and f".{name}." in key]


def _refuse_others(model: nn.Module, config: Any) -> None:
    from peft.tuners.lora import Linear

    why = None
    others = {type(layer).__name__ for layer in lora_layers(model) if type(layer) is not Linear}
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        why = f"the adapter is {config.peft_type}, not LoRA"
    elif others:
        why = f"it adapts {', '.join(sorted(others))} and not linear layers alone"
    elif any(layer.lora_variant for layer in lora_layers(model)):
        why = "it is a variant of LoRA (DoRA and the like)"
    elif config.modules_to_save or config.bias != "none":
        why = "it trains more than its matrices (modules_to_save, bias)"
    elif any(layer is find_head(model) for layer in lora_layers(model)):
        why = "it adapts the language-model head"
    elif any(getattr(drop, "p", 0.0) for layer in lora_layers(model) for drop in layer.lora_dropout.values()):
        why = "it has dropout"
    if why is not None:
        raise ModelError(f"these adapters cannot share a forward: {why}", remedy="train them one after another")


@dataclass
class Parts:
    """How the row is divided that runs at present.

    Attributes:
        num_tokens: Tokens of all parts together, without what may fill the row up behind them.
    """

    num_tokens: int = 0


@contextmanager
def grouped(model: nn.Module, names: Sequence[str]) -> Iterator[Parts]:
    """Let part ``k`` of every row see adapter ``names[k]``; parts have equal length.

    Must surround the backward as well, where activation checkpointing calls the layers again.

    Yields:
        To be told about each row before it runs.
    """
    layers, parts = lora_layers(model), Parts()
    try:
        for layer in layers:
            layer.__dict__["forward"] = partial(_forward, layer, tuple(names), parts)
        yield parts
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _forward(layer: Any, names: tuple[str, ...], parts: Parts, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = layer.base_layer(x, *args, **kwargs)
    flat = x.reshape(-1, x.shape[-1])
    used = parts.num_tokens
    if used % len(names) or not 0 < used <= len(flat):
        raise ModelError(f"{type(layer).__name__} does not see the row as it was packed")
    down = torch.stack([layer.lora_A[name].weight for name in names])
    up = torch.stack([layer.lora_B[name].weight for name in names])
    scaling = put([layer.scaling[name] for name in names], down.device, down.dtype).view(-1, 1, 1)
    each = layer._cast_input_dtype(flat[:used], down.dtype).view(len(names), used // len(names), -1)
    added = (each @ down.transpose(1, 2) * scaling @ up.transpose(1, 2)).reshape(used, -1)
    if used < len(flat):
        added = torch.cat([added, added.new_zeros(len(flat) - used, added.shape[-1])])
    total: Tensor = result + added.view_as(result)
    return total.to(result.dtype)
