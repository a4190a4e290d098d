"""Attention over a packed row with PyTorch's scaled-dot-product attention, on any device and dtype.

The row is cut with ``split``, never with slices: the backward of ``split`` is one concatenation, while every slice's
backward allocates a zero tensor as large as the row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from preftune.kernels.attention.reference import AttentionSpec

if TYPE_CHECKING:
    from preftune.packing import RowLayout


def supports(query: Tensor, value: Tensor, layout: RowLayout, spec: AttentionSpec) -> bool:
    """Whether this backend computes exactly what is asked for."""
    return spec.plain


def attend(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, spec: AttentionSpec) -> Tensor:
    """Attention over one packed row; shapes as in :func:`preftune.kernels.attention.reference.attend`."""
    sizes = [size for span in layout.spans for size in (span.prefix, *span.branches)]
    queries, keys, values = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    pieces: list[Tensor] = []
    index = 0
    for span in layout.spans:
        prefix = index
        for branch in range(prefix + 1, prefix + 1 + len(span.branches)):
            first = branch == prefix + 1
            own_queries = torch.cat([queries[prefix], queries[branch]], 2) if first else queries[branch]
            own_keys = torch.cat([keys[prefix], keys[branch]], 2)
            own_values = torch.cat([values[prefix], values[branch]], 2)
            pieces.append(_dense(own_queries, own_keys, own_values, spec))
        index += 1 + len(span.branches)
    return torch.cat(pieces, 2).transpose(1, 2)


def _dense(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
    num_queries, num_keys = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    # With a mask, accelerators have no fused kernel for grouped heads.
    grouped = groups > 1 and query.device.type == "cpu"
    if groups > 1 and not grouped:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    causal = num_queries == num_keys and not spec.windowed(num_keys)
    mask = None if causal else _mask(num_queries, num_keys, spec.window, query.device)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=spec.scale, enable_gqa=grouped
    )


def _mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean visibility ``(num_queries, num_keys)``, the last query being aligned with the last key."""
    key_pos = torch.arange(num_keys, device=device)
    query_pos = key_pos[num_keys - num_queries :, None]
    visible = key_pos <= query_pos
    if window is not None:
        visible &= key_pos > query_pos - window
    return visible
