"""Ways in which a model, or what runs it, can be wrong on packed rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from preftune.kernels.attention import AttentionSpec, RowContext
from preftune.models import attention
from preftune.packing import RowLayout

Attend = Callable[[Tensor, Tensor, Tensor, RowContext, AttentionSpec], Tensor]


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: RowLayout,
    spec: AttentionSpec,
    *,
    extra: tuple[tuple[int, int], ...] = (),
    window: int | None = None,
    tiled: bool = False,
    weights_of: Callable[[Tensor], Tensor] = lambda scores: torch.softmax(scores, -1),
) -> Tensor:
    """Attention with a dense mask: visibility written down token by token, plus what is not meant to be seen."""
    tree, branch = (torch.from_numpy(each) for each in layout.tree_and_branch())
    position = torch.from_numpy(layout.position_ids())
    same = (tree[:, None] == tree[None]) & ((branch[None] == -1) | (branch[:, None] == branch[None]))
    visible = same & (position[None] <= position[:, None])
    if window is not None:
        visible &= position[None] > position[:, None] - window
    for q, k in extra:
        visible[q, k] = True
    groups = query.shape[1] // key.shape[1]
    if tiled:
        key, value = key.repeat(1, groups, 1, 1), value.repeat(1, groups, 1, 1)
    else:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query.float() @ key.float().transpose(-1, -2)) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if spec.sinks is not None:
        sinks = spec.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
    else:
        weights = weights_of(scores)
    return (weights @ value.float()).to(value.dtype).transpose(1, 2)


@contextmanager
def attending(function: Attend) -> Iterator[None]:
    """Layers attend by ``function``; their calls and requests are recorded as ever."""
    true = attention.attend  # type: ignore[attr-defined]

    def attend(query: Tensor, key: Tensor, value: Tensor, context: RowContext, spec: AttentionSpec) -> Tensor:
        true(query, key, value, context, spec)
        return function(query, key, value, context, spec)

    with mock.patch.object(attention, "attend", attend):
        yield


def _spans(context: RowContext) -> Any:
    return next(span for span in context.layout.spans if span.prefix > 1 and len(span.branches) > 1)


def foreign_key(query: Tensor, key: Tensor, value: Tensor, context: RowContext, spec: AttentionSpec) -> Tensor:
    """A token of the row's second tree sees the row's first token."""
    q = context.layout.spans[1].branch_starts()[1]
    return dense(query, key, value, context.layout, spec, extra=((q, 0),), window=spec.window)


def other_answer(query: Tensor, key: Tensor, value: Tensor, context: RowContext, spec: AttentionSpec) -> Tensor:
    """The rejected answer sees the last token of the chosen one."""
    _, second = _spans(context).branch_starts()
    return dense(query, key, value, context.layout, spec, extra=((second + 1, second - 1),), window=spec.window)


def future_token(query: Tensor, key: Tensor, value: Tensor, context: RowContext, spec: AttentionSpec) -> Tensor:
    """Tokens of an answer see the one after them."""
    answers = [(n, k) for s in context.layout.spans for n, k in zip(s.branch_starts(), s.branches, strict=True)]
    pairs = tuple((n, n + 1) for start, length in answers for n in range(start, start + length - 1))
    return dense(query, key, value, context.layout, spec, extra=pairs, window=spec.window)


def window_off_by_one(query: Tensor, key: Tensor, value: Tensor, context: RowContext, spec: AttentionSpec) -> Tensor:
    """Windows hold one token less."""
    return dense(query, key, value, context.layout, spec, window=None if spec.window is None else spec.window - 1)


def window_ignored(query: Tensor, key: Tensor, value: Tensor, context: RowContext, spec: AttentionSpec) -> Tensor:
    """Windows hold all tokens."""
    return dense(query, key, value, context.layout, spec)


def cap_dropped(query: Tensor, key: Tensor, value: Tensor, context: RowContext, spec: AttentionSpec) -> Tensor:
    """No soft cap."""
    return dense(query, key, value, context.layout, AttentionSpec(spec.scale, sinks=spec.sinks), window=spec.window)


def sinks_dropped(query: Tensor, key: Tensor, value: Tensor, context: RowContext, spec: AttentionSpec) -> Tensor:
    """No sinks."""
    return dense(query, key, value, context.layout, AttentionSpec(spec.scale), window=spec.window)


def wrong_groups(query: Tensor, key: Tensor, value: Tensor, context: RowContext, spec: AttentionSpec) -> Tensor:
    """Query heads take the keys of another group."""
    return dense(query, key, value, context.layout, spec, window=spec.window, tiled=True)


def wrong_scale(query: Tensor, key: Tensor, value: Tensor, context: RowContext, spec: AttentionSpec) -> Tensor:
    """Scores are a tenth too large."""
    wider = AttentionSpec(1.1 * spec.scale, sinks=spec.sinks, softcap=spec.softcap)
    return dense(query, key, value, context.layout, wider, window=spec.window)


def prefix_twice(query: Tensor, key: Tensor, value: Tensor, context: RowContext, spec: AttentionSpec) -> Tensor:
    """The second answer counts every token of its prompt twice."""
    span = _spans(context)
    second = span.branch_starts()[1]
    double = torch.zeros(query.shape[2], query.shape[2])
    double[second : second + span.branches[1], span.start : span.start + span.prefix] = float(
        torch.log(torch.tensor(2.0))
    )
    weights: Callable[[Tensor], Tensor] = lambda scores: torch.softmax(scores + double, -1)  # noqa: E731
    return dense(query, key, value, context.layout, spec, window=spec.window, weights_of=weights)


def prefix_gradient_lost(query: Tensor, key: Tensor, value: Tensor, context: RowContext, spec: AttentionSpec) -> Tensor:
    """Nothing flows from the second answer back into its prompt."""
    span = _spans(context)
    second = span.branch_starts()[1]
    cut = slice(span.start, span.start + span.prefix)
    stopped = [tensor.clone() for tensor in (key, value)]
    for tensor, source in zip(stopped, (key, value), strict=True):
        tensor[:, :, cut] = source[:, :, cut].detach()
    whole = dense(query, key, value, context.layout, spec, window=spec.window)
    without = dense(query, stopped[0], stopped[1], context.layout, spec, window=spec.window)
    return torch.cat([whole[:, :second], without[:, second : second + span.branches[1]],
                      whole[:, second + span.branches[1] :]], 1)  # fmt: skip


def half_gradient(query: Tensor, key: Tensor, value: Tensor, context: RowContext, spec: AttentionSpec) -> Tensor:
    """Half of the values' gradient is lost, everywhere."""
    return dense(query, key, value / 2 + value.detach() / 2, context.layout, spec, window=spec.window)


def dropped_out(query: Tensor, key: Tensor, value: Tensor, context: RowContext, spec: AttentionSpec) -> Tensor:
    """A tenth of the attention weights is dropped, in evaluation as well."""
    weights: Callable[[Tensor], Tensor] = lambda s: torch.dropout(torch.softmax(s, -1), 0.1, True)  # noqa: E731
    return dense(query, key, value, context.layout, spec, window=spec.window, weights_of=weights)


@contextmanager
def positions_off_by_one() -> Iterator[None]:
    """Every answer but the first of its prompt begins one position late."""
    true = RowLayout.position_ids

    def positions(self: RowLayout) -> Any:
        found = true(self).copy()
        for span in self.spans:
            for start, length in list(zip(span.branch_starts(), span.branches, strict=True))[1:]:
                found[start : start + length] += 1
        return found

    with mock.patch.object(RowLayout, "position_ids", positions):
        yield


@contextmanager
def positions_of_the_row() -> Iterator[None]:
    """Positions do not restart."""
    with mock.patch.object(RowLayout, "position_ids", lambda self: torch.arange(self.num_tokens).numpy()):
        yield


def layers_of(model: Any) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers)


@contextmanager
def hooked(model: Any, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """What the first layer returns goes through ``function``."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)

    handle = layers_of(model)[0].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def convolution(hidden: Tensor) -> Tensor:
    """Tokens see a little of the token before them."""
    before = torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
    return hidden + 0.1 * before


def carried_state(hidden: Tensor) -> Tensor:
    """A running mean over all tokens so far is added to each."""
    count = torch.arange(1, hidden.shape[1] + 1, device=hidden.device).view(1, -1, 1)
    return hidden + 0.1 * (hidden.cumsum(1) / count).to(hidden.dtype)


def carried_without_gradient(hidden: Tensor) -> Tensor:
    """The same, without gradient."""
    return hidden + carried_state(hidden.detach()) - hidden.detach()


def scaled_by_row_position(hidden: Tensor) -> Tensor:
    """A factor grows along the row, by a hundredth a token."""
    factor = 1 + 0.01 * torch.arange(hidden.shape[1], device=hidden.device).view(1, -1, 1)
    return hidden * factor.to(hidden.dtype)


#: Faults of the attention: what they are, and words of the reason.
OF_ATTENTION: dict[str, tuple[Attend, str]] = {
    "foreign key": (foreign_key, "earlier pair"),
    "other answer": (other_answer, "other answer"),
    "future token": (future_token, "its own token or later"),
    "prefix twice": (prefix_twice, "other hidden states"),
    "prefix gradient lost": (prefix_gradient_lost, "other gradients"),
    "gradient halved": (half_gradient, "other gradients"),
    "wrong scale": (wrong_scale, "other hidden states"),
    "dropout": (dropped_out, "other values each time"),
}
#: Faults of what is not attention: what they are, and words of the reason.
OF_LAYERS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "convolution": (convolution, "mixes sequences"),
    "carried state": (carried_state, "mixes sequences"),
    "carried without gradient": (carried_without_gradient, "mixes sequences in packed rows (values"),
    "scaled by position in the row": (scaled_by_row_position, "other hidden states"),
}
OF_POSITIONS: dict[str, Any] = {"off by one": positions_off_by_one, "of the row": positions_of_the_row}


def sharpened(model: Any, factor: float = 4.0) -> Any:
    """Random weights make scores near zero, where positions, windows and caps hardly matter: larger ones do not."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and ("q_proj" in name or "k_proj" in name or "c_attn" in name):
                parameter.mul_(factor)
    return model


class RoundedInputs(TorchDispatchMode):
    """Rounds the inputs of fp32 matrix products to TF32's ten bits, as tensor cores do."""

    _PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._PRODUCTS:
            args = tuple(self._round(each) for each in args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _round(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        bits = value.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
