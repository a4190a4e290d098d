"""Getting at a causal language model's head: its weight, what follows it, and the hidden states before it.

The model's own forward runs unchanged, except that its head is replaced, for the length of one call, by a function that
scores only the wanted positions. Nothing depends on a model's name: what a model does *after* its head is found by
letting the replaced head return a known grid of numbers and reading the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from preftune.errors import ModelError
from preftune.kernels.head import HeadTransform


def base_model(model: nn.Module) -> Any:
    """The transformers model under any PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def find_head(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into logits.

    Raises:
        ModelError: The model has none.
    """
    head = base_model(model).get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(base_model(model)).__name__} has no language-model head", remedy="use a causal LM")
    assert isinstance(head, nn.Module)
    return head


def head_parameters(head: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Effective weight ``(V, H)`` and bias of a head, plain LoRA included; ``None`` where it is something else."""
    if hasattr(head, "modules_to_save"):  # peft trains a copy of the head
        return _saved_parameters(head)
    if hasattr(head, "base_layer"):
        return _adapted_parameters(head)
    if isinstance(head, nn.Linear):
        return head.weight, head.bias
    weight = getattr(head, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2 and type(head).forward is nn.Linear.forward:
        return weight, getattr(head, "bias", None)
    return None


def _saved_parameters(head: Any) -> tuple[Tensor, Tensor | None] | None:
    if getattr(head, "disable_adapters", False):
        return head_parameters(head.original_module)
    return head_parameters(head.modules_to_save[head.active_adapters[0]])


def _adapted_parameters(head: Any) -> tuple[Tensor, Tensor | None] | None:
    base = head.base_layer
    if type(base) is not nn.Linear:
        return None
    weight, bias = base.weight, base.bias
    if head.disable_adapters or head.merged:
        return weight, bias
    for name in head.active_adapters:
        if not _is_plain_lora(head, name):
            return None
        weight = weight + head.scaling[name] * (head.lora_B[name].weight @ head.lora_A[name].weight)
    return weight, bias


def _is_plain_lora(head: Any, name: str) -> bool:
    """Whether an adapter adds ``scaling B A`` and nothing else: no DoRA, no bias, no dropout, no other kind."""
    if name not in getattr(head, "lora_A", ()) or name in getattr(head, "lora_variant", ()):
        return False
    # A ModuleDict has no get.
    dropout = head.lora_dropout[name] if name in head.lora_dropout else None  # noqa: SIM401
    up, down = head.lora_B[name], head.lora_A[name]
    plain = all(type(each) is nn.Linear and each.bias is None for each in (up, down))
    return plain and not getattr(dropout, "p", 0.0) and not head.use_dora.get(name, False)


@contextmanager
def replaced_head(
    head: nn.Module, function: Callable[[Tensor], Tensor], after: Callable[..., None] | None = None
) -> Iterator[None]:
    """Call ``function(hidden)`` instead of the head's forward.

    Args:
        head: The head.
        function: Takes its place.
        after: Called like a forward hook, after those that the head has.
    """

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return function(hidden)

    before = head.__dict__.get("forward")
    head.__dict__["forward"] = forward
    hook = None if after is None else head.register_forward_hook(after)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
        if before is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = before


@dataclass(frozen=True)
class HeadProbe:
    """What was found out about a head.

    Attributes:
        called: Whether the model calls its head once per forward, with all hidden states.
        transform: What the model does after the head; ``None`` where it fits no known form.
    """

    called: bool
    transform: HeadTransform | None


def probe_head(model: nn.Module) -> HeadProbe:
    """Find out what ``model`` does with its head's output, by feeding it a grid from -200 to 200 and a huge value."""
    head, base = find_head(model), base_model(model)
    vocab = int(base.config.get_text_config().vocab_size)
    device = next(base.parameters()).device
    grid = torch.linspace(-200, 200, vocab, dtype=torch.float32, device=device)
    grid[-1] = 1e9
    shapes: list[torch.Size] = []

    def give_grid(hidden: Tensor) -> Tensor:
        shapes.append(hidden.shape)
        return grid.expand(*hidden.shape[:-1], vocab).clone()

    training = base.training
    base.eval()
    try:
        with torch.no_grad(), replaced_head(head, give_grid):
            logits = base(input_ids=torch.zeros(1, 3, dtype=torch.long, device=device), use_cache=False).logits
    finally:
        base.train(training)
    called = len(shapes) == 1 and tuple(shapes[0][:-1]) == (1, 3)
    if not called or logits.shape != (1, 3, vocab):
        return HeadProbe(called, None)
    return HeadProbe(called, fit_transform(grid.cpu().double(), logits[0].cpu().double()))


def fit_transform(grid: Tensor, logits: Tensor) -> HeadTransform | None:
    """The transform that maps ``grid`` ``(V,)`` to every row of ``logits`` ``(rows, V)``, or ``None``.

    >>> z = torch.linspace(-200, 200, 9, dtype=torch.float64)
    >>> z[-1] = 1e9
    >>> fit_transform(z, (30 * torch.tanh(z / 30)).expand(2, -1))
    HeadTransform(scale=1.0, softcap=30.0)
    """
    if not torch.isfinite(logits).all():
        return None
    middle = grid.abs()[:-1].topk(min(8, len(grid) - 1), largest=False).indices
    usable = middle[grid[middle].abs() > 0]
    top = float(logits[0, -1])
    candidates = [HeadTransform(top / float(grid[-1]))]
    if top > 0 and len(usable):
        # Near zero the cap is inactive and the slope is the scale; far out only the cap is left.
        z, value = grid[usable[-1]], logits[0, usable[-1]]
        inverse = torch.atanh((value / top).clamp(-0.999999, 0.999999)) * top
        candidates += [HeadTransform(1.0, top), HeadTransform(_round(float(inverse / z)), top)]
    for candidate in candidates:
        expected = candidate.apply(grid.clone()).expand_as(logits)
        if torch.allclose(logits, expected, rtol=2e-5, atol=2e-5):
            return candidate
    return None


def _round(value: float) -> float:
    # Logits near zero came through fp32; six significant digits remove its noise and keep every published constant.
    return float(f"{value:.6g}")
