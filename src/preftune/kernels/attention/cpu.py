"""Attention over a packed row on the CPU, as one autograd node.

PyTorch's CPU flash kernel is called once per dense piece of the block structure, so no mask is ever built and no key is
gathered:

* ``[prefix | branch 0]`` is one causal call;
* a further branch is two calls, over the prefix (all keys) and over itself (causal), whose results are merged by their
  log-sum-exps.

The kernel's backward takes the output and log-sum-exp as inputs. Given the *merged* ones it returns the exact gradient
of its own piece, because the probabilities it recomputes are ``exp(score - lse)`` with the full normaliser. Gradients
are written straight into the three row buffers: autograd would otherwise add a row-sized zero-padded tensor per piece.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from preftune.kernels.attention.reference import AttentionSpec

if TYPE_CHECKING:
    from preftune.packing import RowLayout

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def supports(query: Tensor, value: Tensor, layout: RowLayout, spec: AttentionSpec) -> bool:
    """Whether this backend computes exactly what is asked for."""
    return (
        query.device.type == "cpu"
        and spec.plain
        and not spec.windowed(layout.longest)
        and query.shape[-1] == value.shape[-1]
        and query.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    )


def attend(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, spec: AttentionSpec) -> Tensor:
    """Attention over one packed row; shapes as in :func:`preftune.kernels.attention.reference.attend`."""
    out: Tensor = _RowAttention.apply(query, key, value, layout, spec.scale)  # type: ignore[no-untyped-call]
    return out


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scale: float) -> Tensor:
        num_heads, num_tokens, head_dim = query.shape[1:]
        out = query.new_empty(1, num_tokens, num_heads, head_dim).transpose(1, 2)
        lse = query.new_empty(1, num_heads, num_tokens, dtype=_lse_dtype(query.dtype))
        for span in layout.spans:
            prefix = slice(span.start, span.start + span.prefix)
            starts = span.branch_starts()
            first = slice(span.start, starts[0] + span.branches[0])
            out[:, :, first], lse[:, :, first] = _forward(
                query[:, :, first], key[:, :, first], value[:, :, first], 0.0, True, scale=scale
            )
            for start, length in zip(starts[1:], span.branches[1:], strict=True):
                own = slice(start, start + length)
                queries = query[:, :, own]
                out_own, lse_own = _forward(queries, key[:, :, own], value[:, :, own], 0.0, True, scale=scale)
                if not span.prefix:
                    out[:, :, own], lse[:, :, own] = out_own, lse_own
                    continue
                out_prefix, lse_prefix = _forward(
                    queries, key[:, :, prefix], value[:, :, prefix], 0.0, False, scale=scale
                )
                both = torch.logaddexp(lse_own, lse_prefix)
                lse[:, :, own] = both
                out[:, :, own] = out_own * (lse_own - both).exp().unsqueeze(-1) + out_prefix * (
                    lse_prefix - both
                ).exp().unsqueeze(-1)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        # Unpacked once: activation checkpointing allows no second look.
        saved = ctx.saved_tensors
        dtype, lse = saved[0].dtype, saved[4]
        # On short pieces the kernel's half-precision backward is several times slower than fp32, and less exact.
        wide = torch.promote_types(dtype, torch.float32)
        query, key, value, out = (tensor.to(wide) for tensor in saved[:4])
        grad_out = grad_out.transpose(1, 2).to(wide)
        grads = tuple(_row_buffer(tensor) for tensor in (query, key, value))
        grad_query, grad_key, grad_value = grads

        def piece(queries: slice, keys: slice, causal: bool) -> Any:
            return _backward(
                grad_out[:, :, queries],
                query[:, :, queries],
                key[:, :, keys],
                value[:, :, keys],
                out[:, :, queries],
                lse[:, :, queries],
                0.0,
                causal,
                scale=ctx.scale,
            )

        for span in ctx.layout.spans:
            prefix = slice(span.start, span.start + span.prefix)
            starts = span.branch_starts()
            first = slice(span.start, starts[0] + span.branches[0])
            grad_query[:, :, first], grad_key[:, :, first], grad_value[:, :, first] = piece(first, first, True)
            for start, length in zip(starts[1:], span.branches[1:], strict=True):
                own = slice(start, start + length)
                grad_query[:, :, own], grad_key[:, :, own], grad_value[:, :, own] = piece(own, own, True)
                if span.prefix:
                    from_prefix, prefix_key, prefix_value = piece(own, prefix, False)
                    grad_query[:, :, own] += from_prefix
                    grad_key[:, :, prefix] += prefix_key
                    grad_value[:, :, prefix] += prefix_value
        return (*(grad.to(dtype) for grad in grads), None, None)


def _row_buffer(like: Tensor) -> Tensor:
    # Row-major over tokens, as the projections before the attention produced them: their backward then needs no copy.
    _, heads, tokens, dim = like.shape
    return like.new_empty(1, tokens, heads, dim).transpose(1, 2)


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
