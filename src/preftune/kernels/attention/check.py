"""Whether a backend works on a device: tried once for every kind of layer, before anything relies on it.

Kernels that are compiled on the spot need a compiler and a card that it knows; kernels that come with torch differ from
release to release in signature, in the head sizes they take and in how a causal mask is aligned where there are fewer
queries than keys. Some of that raises, some gives wrong numbers without an error. So values and gradients of a small
row are compared with plain attention in fp64.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from preftune.kernels.attention import reference
from preftune.kernels.attention.reference import AttentionSpec

if TYPE_CHECKING:
    from preftune.packing import RowLayout

Attend = Callable[[Tensor, Tensor, Tensor, "RowLayout", AttentionSpec], Tensor]

#: Largest relative error of output and gradients: bf16 leaves 2e-3 to 1e-2, a wrong mask 0.1 and more.
LIMIT = 3e-2
#: Longer than one block of FlexAttention's mask, which has another kernel for shorter rows.
_LENGTHS = ((60, (40, 50)), (130, (70, 65)), (0, (9,)), (1, (1, 3)), (17, (2, 90)))
_WINDOW = 16


@dataclass(frozen=True)
class Kind:
    """What may decide whether a backend works for a layer.

    Attributes:
        device: Where the layer lies.
        dtype: Of queries, keys and values.
        heads: Query heads and key heads.
        sizes: Head size of queries and keys, and of values.
        windowed: Whether a sliding window is asked for.
        softcap: Bound of the scores, or ``None``.
        sinks: Whether attention sinks are asked for.
    """

    device: torch.device
    dtype: torch.dtype
    heads: tuple[int, int]
    sizes: tuple[int, int]
    windowed: bool
    softcap: float | None
    sinks: bool

    @classmethod
    def of(cls, query: Tensor, value: Tensor, spec: AttentionSpec) -> Kind:
        """The kind of a layer with these tensors, ``(1, heads, T, size)`` each."""
        return cls(
            query.device,
            query.dtype,
            (query.shape[1], value.shape[1]),
            (query.shape[-1], value.shape[-1]),
            spec.window is not None,
            spec.softcap,
            spec.sinks is not None,
        )


_found: dict[tuple[str, Kind], bool] = {}
_told: set[tuple[str, str]] = set()


def works(name: str, attend: Attend, query: Tensor, value: Tensor, spec: AttentionSpec) -> bool:
    """Whether a backend agrees with plain attention for layers of this kind; warns where it does not.

    Args:
        name: Name of the backend.
        attend: Its function.
        query: Queries of the layer.
        value: Values of the layer.
        spec: What the layer asks for.
    """
    key = (name, Kind.of(query, value, spec))
    if key not in _found:
        reason = _apart(attend, key[1])
        _found[key] = reason is None
        if reason is not None and (name, reason) not in _told:
            _told.add((name, reason))
            warnings.warn(
                f"attention backend '{name}' does not work on {key[1].device} and is not used: {reason}",
                UserWarning,
                stacklevel=2,
            )
    return _found[key]


def forget() -> None:
    """Try every backend anew, such as after a compiler was installed."""
    _found.clear()
    _told.clear()


def _apart(attend: Attend, kind: Kind) -> str | None:
    """What is wrong with a backend for layers of a kind, or ``None``."""

    def work() -> float:
        with _on(kind.device):
            return error(attend, kind)

    try:
        found = _apart_from_caller(work)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as failure:  # whatever a kernel or a compiler raises
        text = " ".join(str(failure).split())
        return f"{type(failure).__name__}: {text[:200]}"
    return None if found <= LIMIT else f"its numbers are off by {found:.1e}"


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _apart_from_caller(work: Callable[[], float]) -> float:
    """Call ``work`` in a thread of its own, which knows no autocast, no hooks and no recomputation of the caller's."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def error(attend: Attend, kind: Kind) -> float:
    """Largest relative error of the output and the three gradients of a small row, against fp64."""
    from preftune.packing import RowLayout, TreeSpan

    spans: list[TreeSpan] = []
    for prefix, branches in _LENGTHS:
        spans.append(TreeSpan(sum(span.num_tokens for span in spans), prefix, branches))
    layout = RowLayout(tuple(spans))
    sinks = torch.linspace(-1, 1, kind.heads[0]) if kind.sinks else None
    window = _WINDOW if kind.windowed else None
    generator = torch.Generator().manual_seed(0)

    def made(heads: int, size: int) -> Tensor:
        # As a model's projections leave them: tokens before heads in memory.
        return torch.randn(1, layout.num_tokens, heads, size, generator=generator).to(kind.dtype).transpose(1, 2)

    (heads, groups), (size, value_size) = kind.heads, kind.sizes
    inputs = [made(heads, size), made(groups, size), made(groups, value_size)]
    grad = made(heads, value_size).transpose(1, 2)

    def run(function: Attend, place: dict[str, Any]) -> list[Tensor]:
        leaves = [tensor.to(**place).requires_grad_() for tensor in inputs]
        spec = AttentionSpec(size**-0.5, window, kind.softcap, None if sinks is None else sinks.to(**place))
        out = function(leaves[0], leaves[1], leaves[2], layout, spec)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(**place))]

    with torch.enable_grad():
        got = run(attend, {"device": kind.device, "dtype": kind.dtype})
        expected = run(reference.attend, {"device": "cpu", "dtype": torch.float64})
    return max(float((a.cpu().double() - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True))
