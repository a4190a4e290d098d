"""Whether a model can run on packed rows, as far as it declares it.

No flag of transformers tells an attention that can be packed from one that silently mixes sequences (state-space
layers, chunked attention, convolutions across tokens). So a model has to pass two tests: the *gate* reads what it
declares, the *probe* (:mod:`preftune.models.packing_probe`) runs a few short pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from preftune.models.head import base_model

_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})


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
