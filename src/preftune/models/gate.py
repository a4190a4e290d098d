"""Whether a model can run on packed rows, decided by what it declares and then by trying.

No flag of transformers tells an attention that can be packed from one that silently mixes sequences (state-space
layers, chunked attention, convolutions across tokens). So a model has to pass two tests: the *gate* reads what it
declares, the *probe* runs a few short pairs packed and separately and compares values and gradients.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from preftune.models.forward import RowForward
from preftune.models.head import base_model
from preftune.packing import PackedRow, build_row, pair_trees

_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})
#: Largest relative difference between packed and separate forwards, by the dtype of the weights. Norms and rotary
#: embeddings compute in fp32 even where the weights are fp64.
PROBE_TOLERANCE = {torch.float64: 2e-6, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Verdict:
    """Outcome of the gate or the probe.

    Attributes:
        ok: Whether packed rows may be used.
        reason: Why, in one line fit for users.
        alone: Whether every example needs a forward of its own, since others beside it would change its numbers.
    """

    ok: bool
    reason: str
    alone: bool = False


def check_declared(model: nn.Module, *, max_length: int | None = None) -> Verdict:
    """Read off the model's class, configuration and adapters whether packing is out of the question.

    Args:
        model: Policy, possibly wrapped by PEFT.
        max_length: Longest sequence of the data, for position encodings that depend on the length.
    """
    base = base_model(model)
    name = type(base).__name__
    config = base.config.get_text_config()
    rope = _rope_by_length(config, max_length)
    for reason in _refusals(model, base, config):
        return Verdict(False, f"{name} {reason}", alone=rope is not None)
    if rope is not None:
        return Verdict(False, f"{name} {rope}", alone=True)
    return Verdict(True, f"{name} declares attention that can be packed")


def _refusals(model: Any, base: Any, config: Any) -> Any:
    if not getattr(base, "_supports_attention_backend", False):
        yield "does not accept other attention functions"
    if getattr(base, "_is_stateful", False):
        yield "carries state from token to token"
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS)
    if unknown:
        yield f"has layers of another kind than full or sliding attention ({', '.join(unknown)})"
    peft_configs = getattr(model, "peft_config", None) or {}
    if any(getattr(each, "is_prompt_learning", False) for each in peft_configs.values()):
        yield "is tuned by prompt learning, which puts virtual tokens before every sequence"
    dropout = next(
        (m.p for m in base.modules() if isinstance(m, nn.Dropout) and _inside_attention(base, m) and m.p), 0.0
    )
    if dropout or (getattr(config, "attention_dropout", 0.0) and _attention_dropout(base)):
        yield "uses dropout in its attention (set disable_dropout: true)"


def _rope_by_length(config: Any, max_length: int | None) -> str | None:
    """What is wrong with position encodings that the longest sequence of a batch decides about, if anything is."""
    given = getattr(config, "rope_parameters", None)
    given = given if isinstance(given, dict) else {}
    # One set for all layers, or one for each kind of layer.
    for rope in [each for each in given.values() if isinstance(each, dict)] or [given]:
        kind = rope.get("rope_type", "default")
        if kind not in ("dynamic", "longrope") or max_length is None:
            continue
        original = rope.get("original_max_position_embeddings")
        original = original or getattr(config, "original_max_position_embeddings", None)
        original = original or config.max_position_embeddings
        if max_length > original:
            return f"changes its position encoding with the length ({kind}) and the data exceed {original} tokens"
    return None


def _inside_attention(base: nn.Module, dropout: nn.Module) -> bool:
    return any(dropout is child for m in base.modules() if "Attention" in type(m).__name__ for child in m.children())


def _attention_dropout(base: nn.Module) -> bool:
    return any(getattr(m, "attention_dropout", 0.0) for m in base.modules() if isinstance(m, nn.Module))


def probe(model: nn.Module, *, backend: str = "auto", pad_token_id: int = 0) -> Verdict:
    """Run short pairs packed and separately, and compare log-probs and gradients.

    Args:
        model: Policy, possibly wrapped by PEFT; left as it was.
        backend: Attention backend to try.
        pad_token_id: Fills the padded batch.
    """
    name = type(base_model(model)).__name__
    row = _probe_row(int(base_model(model).config.get_text_config().vocab_size))
    training = model.training
    model.eval()
    try:
        packed = RowForward.of(model, packed=True, backend=backend, pad_token_id=pad_token_id)
        padded = RowForward(model, False, backend, packed.head, pad_token_id)
        watched = _watched_parameters(model)
        with _requiring_grad(watched):
            expected = _values_and_grads(padded, row, watched)
            got = _values_and_grads(packed, row, watched)
        _try_training(packed, row)
    except Exception as error:  # any failure of a foreign model means: not packable
        return Verdict(False, f"{name} fails on packed rows ({_one_line(error)})")
    finally:
        model.train(training)
    config = base_model(model).config.get_text_config()
    layers = int(config.num_hidden_layers)
    if packed.last_context.calls != layers:
        return Verdict(False, f"{name} attends {packed.last_context.calls} times in {layers} layers on packed rows")
    if packed.last_context.windowed < _num_windowed(base_model(model), config):
        return Verdict(False, f"{name} has a sliding window that it does not tell its attention of")
    tolerance = PROBE_TOLERANCE.get(next(model.parameters()).dtype, 2e-4)
    # Some gradients are zero in exact arithmetic (a bias on the keys, without rotary positions): what rounding leaves
    # of them is measured against the largest gradient.
    least = 1e-3 * max(float(each.double().norm()) for each in expected[1:])
    worst = max(_difference(a, b, least) for a, b in zip(got, expected, strict=True))
    if not worst <= tolerance:
        return Verdict(False, f"{name} mixes sequences in packed rows (probe differs by {worst:.1e})")
    return Verdict(True, f"{name} passes the probe (packed and separate differ by {worst:.1e})")


def _num_windowed(base: nn.Module, config: Any) -> int:
    """Layers that the model masks by a sliding window: sequences as short as the probe's never fill one."""
    makes_masks = hasattr(sys.modules.get(type(base).__module__), "create_sliding_window_causal_mask")
    if not makes_masks or getattr(config, "sliding_window", None) is None:
        return 0
    kinds = getattr(config, "layer_types", None)
    return 1 if kinds is None else list(kinds).count("sliding_attention")


def _probe_row(vocab: int) -> PackedRow:
    rng = np.random.default_rng(0)

    def ids(length: int) -> Any:
        return rng.integers(0, vocab, length)

    # Lengths chosen so that branches differ, one prompt is a single token, and a third pair follows the longest one.
    sizes = [(6, 5, 9), (1, 3, 2), (11, 2, 7)]
    trees = [
        tree
        for number, (prompt, chosen, rejected) in enumerate(sizes)
        for tree in pair_trees(ids(prompt), ids(chosen), ids(rejected), None, (2 * number, 2 * number + 1))
    ]
    return build_row(trees, range(len(sizes)))


def _watched_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A few parameters that see all of the layers: their gradients reveal what values alone might hide."""
    floating = [p for p in model.parameters() if p.is_floating_point()]
    small = [p for p in floating if p.dim() == 1]
    matrices = [p for p in floating if p.dim() == 2 and p.numel() <= 1 << 24]
    return [*small[:32], *matrices[:4], *matrices[-2:]]


class _requiring_grad:
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters

    def __enter__(self) -> None:
        self.before = [p.requires_grad for p in self.parameters]
        for p in self.parameters:
            p.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for p, flag in zip(self.parameters, self.before, strict=True):
            p.requires_grad_(flag)


def _values_and_grads(forward: RowForward, row: PackedRow, watched: list[nn.Parameter]) -> list[Tensor]:
    with torch.enable_grad(), forward.active():
        scores, _ = forward(row)
        sign = torch.from_numpy(1.0 - 2.0 * (row.target_slot % 2)).to(scores.logps)
        grads = torch.autograd.grad((scores.logps * sign).sum(), watched, allow_unused=True)
    return [
        scores.logps.detach(),
        *(torch.zeros_like(p) if g is None else g for p, g in zip(watched, grads, strict=True)),
    ]


def _try_training(forward: RowForward, row: PackedRow) -> None:
    """Run a row as in training, where an attention may turn out to have dropout; no random number is used up."""
    model = forward.model
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad(), forward.active():
        model.train()
        forward(row)


def _difference(got: Tensor, expected: Tensor, least: float) -> float:
    scale = max(float(expected.double().norm()), least, 1e-12)
    return float((got.double() - expected.double()).norm()) / scale


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"
