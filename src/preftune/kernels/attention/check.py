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

#: Largest error of a token's result, relative to the size of all. Half precision shows up to .02 here; a key too many
#: or too few, a dropped cap or sink, a wrong head show .3 and more.
TOLERANCE = 0.1


def check_kernel(request: Request) -> str | None:
    """Run a request's backend on a short row of random tensors; what is wrong with it, or ``None``."""
    try:
        values, gradients = kernel_errors(request)
    except Exception as error:
        what = f"fails with {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    else:
        if values <= TOLERANCE and gradients <= TOLERANCE:
            return None
        what = f"computes other {'gradients' if values <= TOLERANCE else 'values'} than asked for"
    return f"the {request.backend} kernel {what} ({request})"


def kernel_errors(request: Request) -> tuple[float, float]:
    """Errors of a request's backend against the reference in fp64, of its values and of its gradients.

    The inputs are scaled so that each part of the request matters: scores vary by a few units, or as far as the soft
    cap bends them, and sinks weigh as much as keys. A window matters where it is shorter than twelve tokens.

    Returns:
        The largest error of a token and head, relative to the root mean square of all; infinite where not finite.
    """
    from preftune.kernels.attention.select import RowContext, attend
    from preftune.packing import RowLayout, TreeSpan

    layout = RowLayout((TreeSpan(0, 5, (4, 7)), TreeSpan(16, 1, (2, 6)), TreeSpan(25, 0, (3,))))
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
    with torch.enable_grad(), torch.autocast(request.device.type, enabled=False):
        got = attend(query, key, value, RowContext(layout, request.backend), spec)
        direction = torch.randn(got.shape, generator=generator).to(got)
        grads = torch.autograd.grad(got, (query, key, value), direction)
    wide = [each.detach().cpu().double().requires_grad_(True) for each in (query, key, value)]
    wide_query, wide_key, wide_value = wide
    spec = replace(spec, sinks=sinks.cpu().double() if request.sinks else None)
    expected = reference.attend(wide_query, wide_key, wide_value, layout, spec)
    expected_grads = torch.autograd.grad(expected, wide, direction.cpu().double())
    return _error(got, expected), max(_error(*each) for each in zip(grads, expected_grads, strict=True))


def _error(got: Tensor, expected: Tensor) -> float:
    difference, expected = (got.detach().cpu().double() - expected.detach()).norm(dim=-1), expected.detach()
    worst = float(difference.max() / expected.norm(dim=-1).square().mean().sqrt().clamp_min(1e-30))
    return worst if worst == worst else float("inf")
