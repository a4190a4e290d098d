"""Attention over a packed row with FlexAttention on CUDA: for soft caps and sinks, which ``varlen_attn`` lacks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from preftune.kernels.attention import check
from preftune.kernels.attention.reference import AttentionSpec
from preftune.kernels.device import put, put_together

if TYPE_CHECKING:
    from preftune.packing import RowLayout

#: Tokens of a block of the mask, queries and keys alike; FlexAttention's own default.
BLOCK = 128

Ints = npt.NDArray[np.int64]


def mask_function(layout: RowLayout, window: int | None, device: torch.device) -> Callable[..., Tensor]:
    """Visibility of key ``k`` to query ``q``: same tree, in the prefix or the same branch, not later in position."""
    tree_of, branch_of, position = put_together([*layout.tree_and_branch(), layout.position_ids()], device)

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = (tree_of[q] == tree_of[k]) & ((branch_of[k] == -1) | (branch_of[k] == branch_of[q]))
        ordered = position[k] <= position[q]
        if window is not None:
            ordered = ordered & (position[k] > position[q] - window)
        return same & ordered

    return visible


def supports(query: Tensor, value: Tensor, layout: RowLayout, spec: AttentionSpec) -> bool:
    """Whether this backend computes exactly what is asked for, and can be compiled for it."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and check.works(check.Request.of("flex", query, value, spec), attend)
    )


def make_mask(layout: RowLayout, window: int | None, device: torch.device) -> Any:
    """Block mask of the row; built once per row and window and shared by all layers.

    FlexAttention's own builder tries every pair of tokens, which takes 17 GB for a row of 131,072. A layout says which
    keys a query sees: at most two intervals. Memory here is one number per token and per pair of blocks.
    """
    from torch.nn.attention.flex_attention import BlockMask

    size = layout.num_tokens
    touched, full = _blocks(layout, window)
    lists = [array for kept in (touched & ~full, full) for array in _sparse(kept)]
    numbers, indices, full_numbers, full_indices = (put(array, device) for array in lists)
    return BlockMask.from_kv_blocks(
        numbers,
        indices,
        full_numbers,
        full_indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_function(layout, window, device),
        seq_lengths=(size, size),
    )


def _blocks(layout: RowLayout, window: int | None) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which blocks of keys (columns) a block of queries (rows) sees something of, and which it sees all of."""
    number = -(-layout.num_tokens // BLOCK)
    touched, full = (np.zeros((number, number + 1), dtype=np.int64) for _ in range(2))
    for query, low, high in _intervals(layout, window):
        row = query // BLOCK
        seen = high > low
        _add_range(touched, row[seen], low[seen] // BLOCK, (high[seen] - 1) // BLOCK + 1)
        whole, after = -(-low // BLOCK), high // BLOCK
        seen = after > whole
        _add_range(full, row[seen], whole[seen], after[seen])
    return touched.cumsum(1)[:, :-1] > 0, full.cumsum(1)[:, :-1] == BLOCK


def _add_range(steps: Ints, row: Ints, begin: Ints, end: Ints) -> None:
    np.add.at(steps, (row, begin), 1)
    np.add.at(steps, (row, end), -1)


def _intervals(layout: RowLayout, window: int | None) -> list[tuple[Ints, Ints, Ints]]:
    """Every query's visible keys as half-open intervals ``(query, low, high)``: its own stretch, and its prefix.

    A prefix and the first branch behind it are one stretch.
    """
    stretch, prefix, prefix_end = [], [], []
    for span in layout.spans:
        starts = span.branch_starts()
        stretch.append(np.full(span.prefix + span.branches[0], span.start))
        for start, length in zip(starts[1:], span.branches[1:], strict=True):
            stretch.append(np.full(length, start))
        prefix.append(np.full(span.num_tokens, span.start))
        prefix_end.append(np.full(span.num_tokens, span.start + span.prefix))
    query = np.arange(layout.num_tokens)
    own, first, end = np.concatenate(stretch), np.concatenate(prefix), np.concatenate(prefix_end)
    # The first branch has its prefix in its own stretch already.
    end = np.where(own == first, first, end)
    back = first
    if window is not None:
        own = np.maximum(own, query - window + 1)
        back = np.minimum(np.maximum(first, first + layout.position_ids() - window + 1), end)
    return [(query, own, query + 1), (query, back, end)]


def _sparse(kept: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Number of kept blocks per row, and their columns first in a list of all, as FlexAttention wants them."""
    columns = np.argsort(~kept, axis=1, kind="stable").astype(np.int32)
    return kept.sum(1).astype(np.int32)[None, None], columns[None, None]


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, spec: AttentionSpec, block_mask: Any = None
) -> Tensor:
    """Attention over one packed row; shapes as in :func:`preftune.kernels.attention.reference.attend`."""
    from torch.nn.attention.flex_attention import AuxRequest

    block_mask = block_mask if block_mask is not None else make_mask(layout, spec.window, query.device)
    softcap = spec.softcap

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap) if softcap is not None else score

    found = _kernel(query.device.type)(
        query,
        key,
        value,
        score_mod=capped if softcap is not None else None,
        block_mask=block_mask,
        scale=spec.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=None if spec.sinks is None else AuxRequest(lse=True),
    )
    out: Tensor = found
    if spec.sinks is not None:
        out, aux = found
        # A sink adds exp(sink) to the softmax's denominator: out * sum / (sum + exp(sink)).
        keep = torch.sigmoid(aux.lse - spec.sinks.to(aux.lse.dtype).view(1, -1, 1))
        out = out * keep.unsqueeze(-1).to(out.dtype)
    return out.transpose(1, 2)


@cache
def _kernel(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled, FlexAttention materialises every score; only the compiled kernel is worth using on CUDA.
    kernel: Callable[..., Any] = flex_attention
    return torch.compile(kernel, dynamic=True) if device_type == "cuda" else kernel
