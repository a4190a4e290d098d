"""What a model weighs and computes, from its configuration alone: built on the meta device, nothing downloaded."""

from __future__ import annotations

import contextlib
import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.errors import ModelError
from preftune.files import parse_json
from preftune.models.trust import pinned

#: A prime, so that an axis of this length can only be the tokens.
_SAMPLE_TOKENS = 53
#: A model of this many parameters has about one layer per 128 units of width: 12 x 128^2 parameters per cubed layer.
_WIDTH_PER_LAYER = 128
_TYPICAL_VOCAB = 32_000
#: Bytes of a quantised weight: its bits and one fp32 constant per block of 64 (nf4), or per row (int8).
_QUANTISED_BYTES = {4: 0.5 + 4 / 64, 8: 1.0}


@dataclass(frozen=True)
class Shape:
    """What memory and time depend on.

    Attributes:
        name: Of the model.
        num_parameters: All parameters, adapters included.
        num_trainable: Those that the optimizer updates.
        weight_bytes: Bytes of all weights.
        trainable_bytes: Bytes of the trainable ones.
        cast_bytes: Bytes of the half-precision copies that autocast keeps of fp32 matrices over a step.
        activation_bytes: Bytes per row token that the body keeps for the backward.
        body_matmul: Elements of the body's weight matrices that every token is multiplied with.
        head_elements: Elements of the head's matrix.
        vocab: Vocabulary size.
        hidden: Width.
        layers: Depth.
        max_positions: Longest sequence that the model was made for, or ``None``.
        head_trains: Whether the head's matrix is trained.
        exact: Whether activations were traced, or estimated by formula.
    """

    name: str
    num_parameters: int
    num_trainable: int
    weight_bytes: int
    trainable_bytes: int
    cast_bytes: int
    activation_bytes: float
    body_matmul: int
    head_elements: int
    vocab: int
    hidden: int
    layers: int
    max_positions: int | None
    head_trains: bool
    exact: bool


def config_of_size(num_parameters: float) -> Any:
    """A Llama configuration of about this many parameters, with usual proportions."""
    from transformers import LlamaConfig

    layers = max(1, round((num_parameters / (12 * _WIDTH_PER_LAYER**2)) ** (1 / 3)))
    vocab = int(min(_TYPICAL_VOCAB, max(256, num_parameters / 1000)))
    # Solved for the width: layers * 12 h^2 + 2 h vocab = parameters.
    a, b = 12 * layers, 2 * vocab
    hidden = (-b + (b * b + 4 * a * num_parameters) ** 0.5) / (2 * a)
    per_head = 64 if hidden >= 512 else 16
    heads = max(1, round(hidden / per_head))
    # Three matrices of the gated MLP hold two thirds of a layer's 12 h^2.
    width = per_head * heads
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=max(8, round(8 / 3 * width)),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=False,
    )


def load_config(name: str, *, revision: str = "main", trust_remote_code: bool = False) -> Any:
    """The configuration of a model, its ``config.json`` and nothing else.

    Args:
        name: Folder, or name on the Hub.
        revision: Branch, tag or commit.
        trust_remote_code: Run code that comes with it.

    Returns:
        The configuration; of the base model where ``name`` is an adapter's folder.

    Raises:
        ModelError: It cannot be found or read.
    """
    from transformers import AutoConfig

    adapter = Path(name).expanduser() / "adapter_config.json"
    try:
        if adapter.is_file() and not adapter.with_name("config.json").exists():
            name, revision = str(parse_json(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]), "main"
        keywords = pinned(name, {"revision": revision, "trust_remote_code": trust_remote_code})
        return AutoConfig.from_pretrained(name, **keywords)
    except ModelError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:160]
        raise ModelError(
            f"the model's config.json cannot be read ({said})",
            where="model_name_or_path",
            value=name,
            remedy="give a folder, or --num_parameters 7e9 in its place",
        ) from error


def shape_of(
    config: Any,
    *,
    name: str = "",
    dtype: str = "float32",
    lora: Any = None,
    half: bool = False,
    bits: int | None = None,
) -> Shape:
    """Measure a model without its weights.

    Args:
        config: Configuration of a causal language model.
        name: For messages.
        dtype: Type that the weights are loaded in.
        lora: A ``peft.PeftConfig``, or ``None`` for all weights.
        half: Whether training runs under bf16 autocast.
        bits: 4 or 8 where frozen matrices are quantised.

    Returns:
        Sizes; parameters are exact, activations traced with PyTorch's own scaled-dot-product attention.

    Raises:
        ModelError: The configuration is not one of a causal language model.
    """
    import torch

    kind = getattr(torch, dtype if dtype in ("bfloat16", "float16") else "float32")
    text = config.get_text_config()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model: Any = empty_model(config, kind)
            base = model
            if lora is not None:
                from peft import get_peft_model

                model = get_peft_model(model, copy.deepcopy(lora))
                base = model.get_base_model()
        except Exception as error:
            said = " ".join(str(error).split())[:160]
            raise ModelError(f"no causal language model can be built ({said})", where=name or "config") from error
        traced = _activation_bytes(base, kind, half, lora is not None)
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    head = base.get_output_embeddings()
    weight = None if head is None else getattr(head, "weight", None)
    head_elements = 0 if weight is None else weight.numel()
    embedding = base.get_input_embeddings()
    skipped = {id(p) for p in (weight, getattr(embedding, "weight", None)) if p is not None}
    matrices = [p for p in parameters if p.dim() >= 2 and id(p) not in skipped]
    cast = [*matrices, *([] if weight is None else [weight])] if half and kind is torch.float32 else []
    saved = 0
    if bits is not None:
        frozen = [p for p in matrices if not p.requires_grad]
        saved = round(sum(p.numel() * (p.element_size() - _QUANTISED_BYTES[bits]) for p in frozen))
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    return Shape(
        name=name,
        num_parameters=sum(p.numel() for p in parameters),
        num_trainable=sum(p.numel() for p in trainable),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters) - saved,
        trainable_bytes=sum(p.numel() * p.element_size() for p in trainable),
        # Autocast caches the copies of weights that require a gradient, and makes the others anew at each use.
        cast_bytes=sum(2 * p.numel() for p in cast if p.requires_grad),
        activation_bytes=_by_formula(text, half) if traced is None else traced,
        body_matmul=sum(p.numel() for p in matrices),
        head_elements=head_elements,
        vocab=int(text.vocab_size),
        hidden=hidden,
        layers=layers,
        max_positions=getattr(text, "max_position_embeddings", None),
        head_trains=weight is not None and weight.requires_grad,
        exact=traced is not None,
    )


def empty_model(config: Any, dtype: Any = None) -> Any:
    """A causal language model without memory for its weights, to count and to trace."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        # A configuration remembers the attention that was tried with it, and is the caller's besides.
        try:
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa")
        except ValueError:
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="eager")


def _activation_bytes(base: Any, kind: Any, half: bool, lora: bool) -> float | None:
    """Bytes per token that autograd saves of the body's forward, on tensors without memory; ``None`` if it fails.

    The kernels of the processor stand for those of an accelerator, which keep the same tensors but for the attention's
    few statistics per head.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.func import functional_call

    if getattr(base.config, "_attn_implementation", "sdpa") != "sdpa":
        return None
    body = base.get_decoder() if hasattr(base, "get_decoder") else base.base_model
    held: dict[int, Any] = {}

    def note(tensor: Any) -> Any:
        if any(size and size % _SAMPLE_TOKENS == 0 for size in tensor.shape):
            # Held, so that no other storage takes its address.
            storage = tensor.untyped_storage()
            held[storage._cdata] = storage
        return tensor

    def twin(tensor: Any, grad: bool) -> Any:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", requires_grad=grad)

    body.train()
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if half else contextlib.nullcontext()
    try:
        with FakeTensorMode():
            state = {key: twin(p, p.requires_grad) for key, p in body.named_parameters()}
            state |= {key: twin(b, False) for key, b in body.named_buffers()}
            positions = torch.arange(_SAMPLE_TOKENS)[None]
            inputs: dict[str, Any] = {"position_ids": positions, "use_cache": False}
            if lora:
                width = base.get_input_embeddings().weight.shape[1]
                inputs["inputs_embeds"] = torch.zeros(1, _SAMPLE_TOKENS, width, dtype=kind, requires_grad=True)
            else:
                inputs["input_ids"] = torch.zeros(1, _SAMPLE_TOKENS, dtype=torch.long)
            hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
            with autocast, hooks:
                result = functional_call(body, state, kwargs=inputs)
        total = sum(storage.nbytes() for storage in held.values())
        del result
    except Exception:
        # Whatever a model's own code does with tensors that hold nothing: the formula is left.
        return None
    return total / _SAMPLE_TOKENS if total else None


def _by_formula(text: Any, half: bool) -> float:
    """A gated block by count: about 12 tensors of the width and 4 of the MLP's are kept per layer and token."""
    width, layers = int(text.hidden_size), int(text.num_hidden_layers)
    inner = int(getattr(text, "intermediate_size", None) or 4 * width)
    return layers * (12 * width + 4 * inner) * (2.7 if half else 4.0)
