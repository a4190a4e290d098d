"""Memory: what a token of a row takes, and how long a packed row may be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from preftune.kernels.device import free_bytes
from preftune.models.forward import RowForward
from preftune.models.head import base_model
from preftune.packing import build_row, pair_trees

#: Longer rows do not run faster: the matmuls are large enough, and caches prefer shorter ones.
MOST_TOKENS = {"cpu": 1024, "cuda": 32768}
#: A prime, so that an axis of this length can only be the tokens.
_SAMPLE_TOKENS = 53
#: Share of the free memory that activations may take.
_ACTIVATION_SHARE = 0.5


def most_tokens(device: torch.device) -> int:
    """Row length beyond which nothing is gained in training on this kind of device."""
    return MOST_TOKENS.get(device.type, 8192)


def reference_budget(max_tokens_per_row: int, device: torch.device) -> int:
    """Tokens of a row of the reference pass.

    Without a graph a row costs a fraction of a training row's memory. On a CPU, whose training rows are short, longer
    ones are faster; an accelerator is busy with a training row, and gains nothing from a longer one.
    """
    longest = min(max_tokens_per_row, most_tokens(device))
    return 4 * longest if device.type == "cpu" else longest


def activation_bytes_per_token(forward: RowForward, autocast: Any) -> float:
    """Bytes that one row token keeps alive between forward and backward, measured on a short row.

    Counts the distinct storages with a token axis that autograd saves; half-precision copies of weights have none.
    """
    vocab = int(base_model(forward.model).config.get_text_config().vocab_size)
    ids = np.random.default_rng(0).integers(0, vocab, _SAMPLE_TOKENS)
    # Short sequences, because a model may have learned few positions.
    thirds = [np.array_split(quarter, 3) for quarter in np.array_split(ids, 4)]
    row = build_row([tree for a, b, c in thirds for tree in pair_trees(a, b, c, None, (0, 1))])
    saved: dict[int, int] = {}
    # Filled up, the row would no longer be recognised by its length.
    forward = replace(forward, row_multiple=1)

    def note(tensor: Tensor) -> Tensor:
        if any(size and size % _SAMPLE_TOKENS == 0 for size in tensor.shape):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        # An output that its own node keeps would never be freed, nor any weight that the graph knows.
        return tensor.detach()

    watch = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with torch.enable_grad(), forward.active(), autocast(), checkpointing(forward.model, False), watch:
        # Held until the sum is taken: a freed storage's address would be used again.
        result = forward(row)
    total = sum(saved.values())
    del result
    return total / _SAMPLE_TOKENS


@contextmanager
def checkpointing(model: nn.Module, on: bool) -> Iterator[None]:
    """Switch the model's activation checkpointing for one row; nothing happens to a model that has none enabled."""
    layers = [m for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    before = [layer.gradient_checkpointing for layer in layers]
    try:
        for layer in layers:
            layer.gradient_checkpointing = on  # type: ignore[assignment]
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer.gradient_checkpointing = flag


def offloading(on: bool, model: nn.Module) -> Any:
    """Context that keeps saved activations in host memory; parameters, and casts of them, stay where they are."""
    if not on:
        return nullcontext()
    parameters = list(model.parameters())
    storages = {p.untyped_storage().data_ptr() for p in parameters}
    # Autocast's copies of weights are storages of their own. What looks like one, either way round, is left alone: an
    # activation that does so by chance only takes memory.
    shapes = {shape for p in parameters for shape in (tuple(p.shape), tuple(p.shape)[::-1])}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tuple(tensor.shape) in shapes or tensor.untyped_storage().data_ptr() in storages:
            return tensor.device, tensor
        pinned = tensor.device.type == "cuda"
        host = torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout, pin_memory=pinned)
        host.copy_(tensor, non_blocking=pinned)
        return tensor.device, host

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def row_budget(per_token: float, device: torch.device, reserved: int) -> int:
    """Tokens per packed row: as many as half the free memory holds, within what is fast.

    Args:
        per_token: Activation bytes per token.
        device: Where the model lies.
        reserved: Bytes that gradients and optimizer state are still going to take.
    """
    return row_limits(per_token, device, reserved, free_bytes(device))[0]


def tokens_that_fit(per_token: float, device: torch.device, reserved: int) -> int:
    """Tokens whose activations fit into the free memory; see :func:`row_budget` for the arguments."""
    return row_limits(per_token, device, reserved, free_bytes(device))[1]


def row_limits(per_token: float, device: torch.device, reserved: int, free: int | None) -> tuple[int, int]:
    """Both of them for a given amount of free memory; ``None`` where it is unknown."""
    most = most_tokens(device)
    if free is None or per_token <= 0:
        return most, 1 << 62
    left = max(free - reserved, free // 10)
    return max(256, min(most, int(left * _ACTIVATION_SHARE / per_token))), int(left / per_token)
