"""Whether the backend that serves a layer computes what the layer asks for, values and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from preftune.kernels.attention import reference
from preftune.kernels.attention.reference import AttentionSpec

if TYPE_CHECKING:
    from preftune.kernels.attention.select import Request
    from preftune.packing import RowLayout

#: Largest error of a token's result, relative to the size of all. Half precision shows up to .02 here; a key too many
#: or too few, a dropped cap or sink, a wrong head show .3 and more.
TOLERANCE = 0.1


def check_kernel(request: Request) -> str | None:
    """Run a request's backend on a short row of random tensors; what is wrong with it, or ``None``.

    The inputs are scaled so that each part of the request matters: scores vary by a few units, or as far as the soft
    cap bends them, and sinks weigh as much as keys. A window matters where it is shorter than eleven tokens.
    """
    from preftune.packing import RowLayout, TreeSpan

    layout = RowLayout((TreeSpan(0, 5, (4, 7)), TreeSpan(16, 1, (2, 6)), TreeSpan(25, 0, (3,))))
    wrong = _compare(request, layout)
    return None if wrong is None else f"the {request.backend} kernel {wrong} ({request})"


def _compare(request: Request, layout: RowLayout) -> str | None:
    from preftune.kernels.attention.select import RowContext, attend

    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, size: int, std: float = 1.0) -> Tensor:
        values = std * torch.randn(1, heads, layout.num_tokens, size, generator=generator)
        return values.to(request.device, request.dtype).requires_grad_(True)

    # A cap changes a score s by about s^3 / (3 cap^2): that much is to be of the order of one.
    spread = 2.0 if request.softcap is None else (2.0 * request.softcap**2) ** (1 / 3)
    query = draw(request.num_heads, request.head_dim, spread / (abs(request.scale) * request.head_dim**0.5))
    key, value = draw(request.num_key_heads, request.head_dim), draw(request.num_key_heads, request.value_dim)
    sinks = torch.randn(request.num_heads, generator=generator).to(request.device, request.dtype) + 1
    spec = AttentionSpec(request.scale, request.window, request.softcap, sinks if request.sinks else None)
    context = RowContext(layout, request.backend)
    try:
        with torch.enable_grad(), torch.autocast(request.device.type, enabled=False):
            got = attend(query, key, value, context, spec)
            direction = torch.randn(got.shape, generator=generator).to(got)
            grads = torch.autograd.grad(got, (query, key, value), direction)
    except Exception as error:
        return f"fails with {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    wide = [each.detach().cpu().double().requires_grad_(True) for each in (query, key, value)]
    plain = replace(spec, sinks=None if spec.sinks is None else spec.sinks.cpu().double())
    expected = reference.attend(*wide, layout, plain)
    expected_grads = torch.autograd.grad(expected, wide, direction.cpu().double())
    if _error(got, expected) > TOLERANCE:
        return "computes other values than asked for"
    for each, other in zip(grads, expected_grads, strict=True):
        if _error(each.transpose(1, 2), other.transpose(1, 2)) > TOLERANCE:
            return "computes other gradients than its values have"
    return None


def _error(got: Tensor, expected: Tensor) -> float:
    """Largest error over tokens and heads, relative to the root mean square of all; infinite where not finite."""
    difference = (got.detach().cpu().double() - expected).norm(dim=-1)
    expected = expected.detach()
    worst = float(difference.max() / expected.norm(dim=-1).square().mean().sqrt().clamp_min(1e-30))
    return worst if worst == worst else float("inf")
