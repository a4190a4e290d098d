"""Whether a backend computes what a layer asks for, values and gradients: tried on a small row of random tensors.

Kernels that are compiled on the spot need a compiler and a card that it knows; kernels that come with torch differ from
release to release in signature, in the head sizes they take and in how a causal mask is aligned where there are fewer
queries than keys. Some of that raises, some gives wrong numbers without an error, some is seen in the backward alone.
So kernels of an accelerator are tried before they are used, and the start-up probe tries whatever serves a model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from preftune.kernels.attention import reference
from preftune.kernels.attention.reference import AttentionSpec

if TYPE_CHECKING:
    from preftune.packing import RowLayout

Attend = Callable[[Tensor, Tensor, Tensor, "RowLayout", AttentionSpec], Tensor]

#: Largest error of a token's result, relative to the size of all. Half precision shows up to .03 here, in the
#: longer row of accelerators .05; a key too many, a wrong window, a dropped cap or sink, a wrong head show .3 and more.
TOLERANCE = 0.1
#: Prefix and branches of the row's trees.
_LENGTHS = ((5, (4, 7)), (1, (2, 6)), (0, (3,)))
#: What an accelerator gets besides: longer than a block of FlexAttention's mask and than the tiles of kernels.
_LONG = ((130, (70, 65)), (17, (2, 90)))
#: There windows are cut to this length, so that these trees fill them. A CPU's backends may rely on windows that are
#: longer than the row.
_WINDOW = 12


@dataclass(frozen=True)
class Request:
    """What a layer asks a backend for, shapes and all.

    Attributes:
        backend: Name of the backend.
        device: Where.
        dtype: Of query, key and value.
        num_heads: Query heads.
        num_key_heads: Heads of keys and values.
        head_dim: Size of queries and keys.
        value_dim: Size of values.
        scale: Factor on the scores.
        window: Sliding window, or ``None``.
        softcap: Soft cap, or ``None``.
        sinks: Whether there are attention sinks.
    """

    backend: str
    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_key_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int | None
    softcap: float | None
    sinks: bool

    @classmethod
    def of(cls, backend: str, query: Tensor, value: Tensor, spec: AttentionSpec) -> Request:
        """What a layer with these tensors, ``(1, heads, T, size)`` each, asks for."""
        return cls(
            backend,
            query.device,
            query.dtype,
            query.shape[1],
            value.shape[1],
            query.shape[3],
            value.shape[3],
            float(spec.scale),
            spec.window,
            spec.softcap,
            spec.sinks is not None,
        )

    def __str__(self) -> str:
        parts = [
            f"{self.dtype}".removeprefix("torch."),
            f"{self.num_heads}:{self.num_key_heads} heads of {self.head_dim}",
        ]
        parts += [f"{name} {value:g}" for name, value in (("window", self.window), ("cap", self.softcap)) if value]
        return ", ".join([*parts, *(["sinks"] if self.sinks else [])])


_found: dict[Request, str | None] = {}
_told: set[tuple[str, str]] = set()


def works(request: Request, attend: Attend) -> bool:
    """Whether a backend serves layers that ask for this; tried once, with a warning where it does not.

    Args:
        request: What the layer asks for.
        attend: The backend's function.
    """
    key = _short(request)
    if key not in _found:
        fault = _found[key] = _fault(key, attend)
        if fault is not None and (request.backend, fault) not in _told:
            _told.add((request.backend, fault))
            warnings.warn(
                f"attention backend '{request.backend}' does not work on {request.device} and is not used: "
                f"it {fault} ({request})",
                UserWarning,
                stacklevel=2,
            )
    return _found[key] is None


def fault_of(request: Request, attend: Attend) -> str | None:
    """What is wrong with a backend, or ``None``; what :func:`works` has found is not tried again.

    Args:
        request: What a layer has asked for.
        attend: The backend's function.
    """
    key = _short(request)
    fault = _found[key] if key in _found else _fault(key, attend)
    return None if fault is None else f"the {request.backend} kernel {fault} ({request})"


def forget() -> None:
    """Try every backend anew, such as after a compiler was installed."""
    _found.clear()
    _told.clear()


def _short(request: Request) -> Request:
    if request.window is None or request.device.type == "cpu":
        return request
    return replace(request, window=min(request.window, _WINDOW))


def _fault(request: Request, attend: Attend) -> str | None:
    """What a backend does wrong, or ``None``."""

    def work() -> tuple[float, float]:
        with _on(request.device):
            return kernel_errors(request, attend)

    try:
        values, gradients = _apart_from_caller(work)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as failure:  # whatever a kernel or a compiler raises
        return f"fails with {type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
    if values <= TOLERANCE and gradients <= TOLERANCE:
        return None
    return f"computes other {'gradients' if values <= TOLERANCE else 'values'} than asked for"


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _apart_from_caller(work: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """Call ``work`` in a thread of its own, which knows no autocast, no hooks and no recomputation of the caller's."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def kernel_errors(request: Request, attend: Attend) -> tuple[float, float]:
    """Errors of a backend against the reference in fp64, of its values and of its gradients.

    The inputs are scaled so that each part of the request matters: scores vary by a few units, or as far as the soft
    cap bends them, and sinks weigh as much as keys.

    Args:
        request: What is asked for; on an accelerator long windows are cut.
        attend: The backend's function.

    Returns:
        The largest error of a token and head, relative to the root mean square of all; infinite where not finite.
    """
    from preftune.packing import RowLayout, TreeSpan

    request = _short(request)
    spans: list[TreeSpan] = []
    for prefix, branches in _LENGTHS if request.device.type == "cpu" else (*_LENGTHS, *_LONG):
        spans.append(TreeSpan(sum(span.num_tokens for span in spans), prefix, branches))
    layout = RowLayout(tuple(spans))
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, size: int, std: float = 1.0) -> Tensor:
        # As a model's projections leave them: tokens before heads in memory.
        values = std * torch.randn(1, layout.num_tokens, heads, size, generator=generator)
        return values.to(request.dtype).transpose(1, 2)

    # A cap changes a score s by about s^3 / (3 cap^2): that much is to be of the order of one.
    spread = 2.0 if request.softcap is None else (2.0 * request.softcap**2) ** (1 / 3)
    query = draw(request.num_heads, request.head_dim, spread / (abs(request.scale) * request.head_dim**0.5))
    inputs = [query, draw(request.num_key_heads, request.head_dim), draw(request.num_key_heads, request.value_dim)]
    direction = draw(request.num_heads, request.value_dim).transpose(1, 2)
    sinks = (torch.randn(request.num_heads, generator=generator) + 1).to(request.dtype)

    def run(function: Attend, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(device, dtype).requires_grad_(True) for tensor in inputs]
        asked = sinks.to(device, dtype) if request.sinks else None
        spec = AttentionSpec(request.scale, request.window, request.softcap, asked)
        out = function(leaves[0], leaves[1], leaves[2], layout, spec)
        return [out.detach(), *torch.autograd.grad(out, leaves, direction.to(device, dtype))]

    with torch.enable_grad():
        got = run(attend, request.device, request.dtype)
        expected = run(reference.attend, torch.device("cpu"), torch.float64)
    values, *gradients = (_error(*each) for each in zip(got, expected, strict=True))
    return values, max(gradients)


def _error(got: Tensor, expected: Tensor) -> float:
    difference = (got.cpu().double() - expected).norm(dim=-1)
    worst = float(difference.max() / expected.norm(dim=-1).square().mean().sqrt().clamp_min(1e-30))
    return worst if worst == worst else float("inf")
