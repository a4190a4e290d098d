"""Which attention backend serves a layer, and the function that models call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from preftune.errors import ConfigError
from preftune.kernels.attention import check, cpu, flex, reference, sdpa, varlen
from preftune.kernels.attention.check import Attend, Request
from preftune.kernels.attention.reference import AttentionSpec

if TYPE_CHECKING:
    from preftune.packing import RowLayout

_BACKENDS: dict[str, Any] = {"varlen": varlen, "cpu": cpu, "flex": flex, "sdpa": sdpa}
#: Names that a user may ask for.
BACKEND_NAMES = ("auto", *_BACKENDS, "reference")


@dataclass
class RowContext:
    """What the attention layers of one forward share: the layout, and tensors derived from it.

    Attributes:
        layout: Trees of the row.
        backend: Name that was asked for; ``auto`` takes the first backend that supports the layer.
        calls: How many layers asked for attention; compared with the number of layers at start-up.
        windowed: How many of them asked for a sliding window.
        used: Backends that served, for reports.
        requests: What the layers asked for, each once.
    """

    layout: RowLayout
    backend: str = "auto"
    calls: int = 0
    windowed: int = 0
    used: set[str] = field(default_factory=set)
    requests: set[Request] = field(default_factory=set)
    _varlen_plan: varlen.VarlenPlan | None = None
    _block_masks: dict[int | None, Any] = field(default_factory=dict)

    def varlen_plan(self, device: torch.device) -> varlen.VarlenPlan:
        """Index tensors for the variable-length kernel."""
        if self._varlen_plan is None:
            self._varlen_plan = varlen.make_plan(self.layout, device)
        return self._varlen_plan

    def block_mask(self, window: int | None, device: torch.device) -> Any:
        """Block mask for FlexAttention."""
        if window not in self._block_masks:
            self._block_masks[window] = flex.make_mask(self.layout, window, device)
        return self._block_masks[window]


def attend(query: Tensor, key: Tensor, value: Tensor, context: RowContext, spec: AttentionSpec) -> Tensor:
    """Attention over one packed row with the best backend that is exact for it.

    Args:
        query: ``(1, H, T, D)``.
        key: ``(1, K, T, D)``.
        value: ``(1, K, T, D_v)``.
        context: Layout and backend name.
        spec: Scale, window, soft cap, sinks.

    Returns:
        ``(1, T, H, D_v)``.

    Raises:
        ConfigError: A backend was asked for by name that cannot compute this layer.
    """
    context.calls += 1
    context.windowed += spec.window is not None
    layout = context.layout
    name = context.backend
    if name == "auto":
        name = next((each for each, b in _BACKENDS.items() if b.supports(query, value, layout, spec)), "reference")
    elif name not in BACKEND_NAMES:
        raise ConfigError("unknown attention backend", value=name, allowed=", ".join(BACKEND_NAMES))
    elif name != "reference" and not _BACKENDS[name].supports(query, value, layout, spec):
        raise ConfigError(
            f"attention backend '{name}' cannot compute a layer of this model exactly",
            where="attention_backend",
            value=f"{query.device.type}, {query.dtype}, {spec}",
            remedy="use attention_backend: auto",
        )
    context.used.add(name)
    context.requests.add(Request.of(name, query, value, spec))
    # Some models take views of what they get, as from the attention functions of transformers.
    return _called(name, query, key, value, context, spec).contiguous()


def function_of(name: str) -> Attend:
    """A backend's function by its name."""
    found: Attend = reference.attend if name == "reference" else _BACKENDS[name].attend
    return found


def check_kernel(request: Request) -> str | None:
    """What is wrong with the backend that served a request, values or gradients; ``None`` for nothing."""
    return check.fault_of(request, function_of(request.backend))


def _called(name: str, query: Tensor, key: Tensor, value: Tensor, context: RowContext, spec: AttentionSpec) -> Tensor:
    layout = context.layout
    if name == "varlen":
        return varlen.attend(query, key, value, layout, spec, context.varlen_plan(query.device))
    if name == "flex":
        return flex.attend(query, key, value, layout, spec, context.block_mask(spec.window, query.device))
    return function_of(name)(query, key, value, layout, spec)
