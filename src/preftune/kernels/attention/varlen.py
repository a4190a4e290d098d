"""Attention over a packed row on CUDA in one variable-length call.

Queries stay in row order. Keys and values are gathered so that every branch has its prefix in front of it::

    row       P C R | P C R
    queries  [P C] [R] [P C] [R]
    keys     [P C] [P R] [P C] [P R]

Each sequence then is causal attention with the last query aligned to the last key. The gather's backward is two gathers
and an addition where a token is used at most twice, so that it needs no atomics and is deterministic.

``torch.nn.attention.varlen.varlen_attn`` changed its signature between releases; what is installed is detected, and
:mod:`preftune.kernels.attention.check` tries it before it is relied on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from preftune.kernels.attention import check
from preftune.kernels.attention.reference import AttentionSpec
from preftune.kernels.device import put_together

if TYPE_CHECKING:
    from preftune.packing import RowLayout

Kernel = Callable[..., Tensor]


@dataclass(frozen=True)
class VarlenPlan:
    """Index tensors of one row, on its device.

    Attributes:
        gather: Row position of every gathered key, shape ``(S,)``.
        first: A gathered position that holds each row token, shape ``(T,)``.
        second: A second such position, or ``-1``, shape ``(T,)``; ``None`` where a token is used more than twice.
        cu_query: Cumulative query lengths, int32, shape ``(sequences + 1,)``.
        cu_key: Cumulative key lengths, int32, shape ``(sequences + 1,)``.
        max_query: Longest query block.
        max_key: Longest key block.
    """

    gather: Tensor
    first: Tensor
    second: Tensor | None
    cu_query: Tensor
    cu_key: Tensor
    max_query: int
    max_key: int


def make_plan(layout: RowLayout, device: torch.device) -> VarlenPlan:
    """Index tensors for ``layout``; computed once per row and shared by all layers."""
    gather, query_lengths, key_lengths = [], [], []
    for span in layout.spans:
        prefix = np.arange(span.start, span.start + span.prefix)
        for index, (start, length) in enumerate(zip(span.branch_starts(), span.branches, strict=True)):
            gather += [prefix, np.arange(start, start + length)]
            query_lengths.append(length + (span.prefix if index == 0 else 0))
            key_lengths.append(length + span.prefix)
    order = np.concatenate(gather)
    uses = np.bincount(order, minlength=layout.num_tokens)
    by_token = np.argsort(order, kind="stable")
    begin = np.concatenate([[0], np.cumsum(uses)[:-1]])
    first = by_token[begin]
    second = np.where(uses > 1, by_token[np.minimum(begin + 1, len(order) - 1)], -1) if uses.max() <= 2 else None

    offsets = [np.concatenate([[0], np.cumsum(lengths)]) for lengths in (query_lengths, key_lengths)]
    placed = put_together([order, first, *offsets, *([] if second is None else [second])], device)
    return VarlenPlan(
        gather=placed[0],
        first=placed[1],
        second=None if second is None else placed[4],
        cu_query=placed[2].to(torch.int32),
        cu_key=placed[3].to(torch.int32),
        max_query=max(query_lengths),
        max_key=max(key_lengths),
    )


def supports(query: Tensor, value: Tensor, layout: RowLayout, spec: AttentionSpec) -> bool:
    """Whether this backend computes exactly what is asked for."""
    return (
        query.device.type == "cuda"
        and spec.plain
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and check.works(check.Request.of("varlen", query, value, spec), attend)
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: RowLayout,
    spec: AttentionSpec,
    plan: VarlenPlan | None = None,
    kernel: Kernel | None = None,
) -> Tensor:
    """Attention over one packed row; shapes as in :func:`preftune.kernels.attention.reference.attend`.

    Args:
        query: See there.
        key: See there.
        value: See there.
        layout: See there.
        spec: See there.
        plan: Index tensors from :func:`make_plan`, if they are at hand.
        kernel: Stands in for the installed ``varlen_attn``; takes the arguments of :func:`call_kernel`.
    """
    plan = plan or make_plan(layout, query.device)
    queries = query[0].transpose(0, 1)
    keys, values = (
        _Gather.apply(tensor[0].transpose(0, 1), plan)  # type: ignore[no-untyped-call]
        for tensor in (key, value)
    )
    out = (kernel or call_kernel)(queries, keys, values, plan, spec.scale, spec.window)
    return out.unsqueeze(0)


def call_kernel(
    query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, scale: float, window: int | None
) -> Tensor:
    """Call the installed ``varlen_attn`` on ``(tokens, heads, D)`` tensors, whatever its signature."""
    from torch.nn.attention.varlen import varlen_attn

    names = _parameters()
    options: dict[str, Any] = {"scale": scale}
    if "window_size" in names:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is not None:
        raise NotImplementedError("the installed varlen_attn has no window")
    else:
        options["is_causal"] = True
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in names:
            options["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = varlen_attn(query, key, value, plan.cu_query, plan.cu_key, plan.max_query, plan.max_key, **options)
    assert isinstance(out, Tensor)
    return out


@cache
def _parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, plan: VarlenPlan) -> Tensor:
        ctx.plan, ctx.num_tokens = plan, tensor.shape[0]
        return tensor.index_select(0, plan.gather)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        plan: VarlenPlan = ctx.plan
        if plan.second is None:
            wide = torch.promote_types(grad.dtype, torch.float32)
            total = grad.new_zeros(ctx.num_tokens, *grad.shape[1:], dtype=wide)
            return total.index_add_(0, plan.gather, grad.to(wide)).to(grad.dtype), None
        again = grad.index_select(0, plan.second.clamp_min(0))
        again *= (plan.second >= 0).view(-1, *[1] * (grad.dim() - 1))
        return grad.index_select(0, plan.first) + again, None
