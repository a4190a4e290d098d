"""Attention over a packed row with FlexAttention on CUDA: for soft caps and sinks, which ``varlen_attn`` lacks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from preftune.kernels.attention.reference import AttentionSpec

if TYPE_CHECKING:
    from preftune.packing import RowLayout


def mask_function(layout: RowLayout, window: int | None, device: torch.device) -> Callable[..., Tensor]:
    """Visibility of key ``k`` to query ``q``: same tree, in the prefix or the same branch, not later in position."""
    tree_of, branch_of = (torch.as_tensor(array, device=device) for array in layout.tree_and_branch())
    position = torch.as_tensor(layout.position_ids(), device=device)

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = (tree_of[q] == tree_of[k]) & ((branch_of[k] == -1) | (branch_of[k] == branch_of[q]))
        ordered = position[k] <= position[q]
        if window is not None:
            ordered = ordered & (position[k] > position[q] - window)
        return same & ordered

    return visible


def supports(query: Tensor, value: Tensor, layout: RowLayout, spec: AttentionSpec) -> bool:
    """Whether this backend computes exactly what is asked for."""
    return query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16, torch.float32)


def make_mask(layout: RowLayout, window: int | None, device: torch.device) -> Any:
    """Block mask of the row; built once per row and window and shared by all layers."""
    from torch.nn.attention.flex_attention import create_block_mask

    size = layout.num_tokens
    return create_block_mask(mask_function(layout, window, device), None, None, size, size, device=device)


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, spec: AttentionSpec, block_mask: Any = None
) -> Tensor:
    """Attention over one packed row; shapes as in :func:`preftune.kernels.attention.reference.attend`."""
    block_mask = block_mask if block_mask is not None else make_mask(layout, spec.window, query.device)
    softcap = spec.softcap

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap) if softcap is not None else score

    out, lse = _kernel(query.device.type)(
        query,
        key,
        value,
        score_mod=capped if softcap is not None else None,
        block_mask=block_mask,
        scale=spec.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_lse=True,
    )
    if spec.sinks is not None:
        # A sink adds exp(sink) to the softmax's denominator: out * sum / (sum + exp(sink)).
        keep = torch.sigmoid(lse - spec.sinks.to(lse.dtype).view(1, -1, 1))
        out = out * keep.unsqueeze(-1).to(out.dtype)
    result: Tensor = out.transpose(1, 2)
    return result


@cache
def _kernel(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled, FlexAttention materialises every score; only the compiled kernel is worth using on CUDA.
    kernel: Callable[..., Any] = flex_attention
    return torch.compile(kernel, dynamic=True) if device_type == "cuda" else kernel
