"""How packed rows reach a model's attention layers.

One function is registered with transformers under :data:`NAME`. While :func:`packed_attention` is active, the model's
configuration names it, so that every layer calls it with the row's layout, which travels as a private keyword. Outside,
the model is untouched: generation, saving and the user's own forwards use the attention it was loaded with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from preftune.errors import ModelError
from preftune.kernels.attention import AttentionSpec, RowContext, attend

#: Name in transformers' registry. No mask function is registered under it, so that no dense mask is ever built.
NAME = "preftune_pairs"
#: Keyword that carries the row's layout through the model's forward.
KEYWORD = "preftune_row"


def pairs_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers models; tensors as ``(1, heads, tokens, head size)``.

    Raises:
        ModelError: The layer asks for something that packed attention does not compute.
    """
    context: RowContext | None = kwargs.get(KEYWORD)
    if context is None:
        raise ModelError(f"{type(module).__name__} did not hand the packed layout to its attention")
    if attention_mask is not None or kwargs.get("position_bias") is not None or dropout:
        raise ModelError(f"{type(module).__name__} uses a mask, a position bias or dropout of its own in its attention")
    if query.shape[2] != context.layout.num_tokens or key.shape[2] != query.shape[2]:
        raise ModelError(f"{type(module).__name__} does not attend over the row as it was packed")
    dtype = _compute_dtype(query, key, value)
    spec = AttentionSpec(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return attend(query.to(dtype), key.to(dtype), value.to(dtype), context, spec), None


def _compute_dtype(query: Tensor, key: Tensor, value: Tensor) -> torch.dtype:
    # Norms on queries and keys return fp32 under autocast while values are half: autocast's dtype decides, as for SDPA.
    device = query.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)


AttentionInterface.register(NAME, pairs_attention)


def keep_attention_untraced() -> None:
    """Let ``torch.compile`` call packed attention as it is: a row's layout is data, not code."""
    AttentionInterface.register(NAME, torch.compiler.disable(pairs_attention))


def attention_configs(model: nn.Module) -> list[Any]:
    """The distinct configuration objects that the model's layers read their attention implementation from."""
    found = {id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if _has_attention(c)}
    return list(found.values())


def _has_attention(config: Any) -> bool:
    return hasattr(config, "_attn_implementation_internal")


@contextmanager
def packed_attention(configs: list[Any]) -> Iterator[None]:
    """Let the layers behind ``configs`` use :func:`pairs_attention`.

    Must be active during the backward as well: activation checkpointing calls the layers again there.
    """
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
