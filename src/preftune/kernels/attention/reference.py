"""Attention over a packed row, written plainly: the oracle of the fast backends and the path for unusual models.

It honours everything that a model may ask for: grouped queries, sliding windows, soft caps and attention sinks.
Legend: B = 1, H query heads, K key heads, T row tokens, Q query tokens, S key tokens, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from preftune.packing import RowLayout


@dataclass(frozen=True)
class AttentionSpec:
    """What a layer asks of its attention.

    Attributes:
        scale: Factor on the scores.
        window: Number of most recent keys a query may see, itself included; ``None`` for all.
        softcap: Scores become ``softcap * tanh(score / softcap)``; ``None`` for none.
        sinks: Extra logit per head that takes part in the softmax and carries no value, shape ``(H,)``.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether only scale and window are asked for."""
        return self.softcap is None and self.sinks is None

    def windowed(self, longest: int) -> bool:
        """Whether the window cuts anything off a sequence of ``longest`` tokens."""
        return self.window is not None and self.window < longest


def attend(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, spec: AttentionSpec) -> Tensor:
    """Attention over one packed row, sequence by sequence, with scores in at least fp32.

    Args:
        query: ``(1, H, T, D)``.
        key: ``(1, K, T, D)``; ``K`` divides ``H``.
        value: ``(1, K, T, D_v)``.
        layout: Trees of the row.
        spec: Scale, window, soft cap and sinks.

    Returns:
        ``(1, T, H, D_v)`` in the dtype of ``value``.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    pieces = []
    for span in layout.spans:
        prefix = slice(span.start, span.start + span.prefix)
        for index, (start, length) in enumerate(zip(span.branch_starts(), span.branches, strict=True)):
            branch = slice(start, start + length)
            keys = torch.cat([key[:, :, prefix], key[:, :, branch]], 2)
            values = torch.cat([value[:, :, prefix], value[:, :, branch]], 2)
            # The prefix attends to itself; computing it along with the first branch gives every row token once.
            queries = torch.cat([query[:, :, prefix], query[:, :, branch]], 2) if index == 0 else query[:, :, branch]
            pieces.append(_dense(queries, keys, values, spec))
    return torch.cat(pieces, 2).transpose(1, 2)


def _dense(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(wide) @ key.to(wide).transpose(-1, -2)) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    num_queries, num_keys = scores.shape[-2:]
    key_pos = torch.arange(num_keys, device=scores.device)
    query_pos = key_pos[num_keys - num_queries :, None]
    visible = key_pos <= query_pos
    if spec.window is not None:
        visible &= key_pos > query_pos - spec.window
    scores = scores.masked_fill(~visible, float("-inf"))
    if spec.sinks is not None:
        sinks = spec.sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    return (weights @ value.to(wide)).to(value.dtype)
