"""What a model weighs and computes, from its configuration alone: built on the meta device, nothing downloaded."""

from __future__ import annotations

import contextlib
import copy
import warnings
from dataclasses import dataclass, replace
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
#: Bytes of a quantised weight: its bits, and one constant per block of 64 (nf4; in fp32, or itself quantised to a byte
#: with an fp32 constant per 256 of them) or per row (int8).
_QUANTISED_BYTES = {(4, False): 0.5 + 4 / 64, (4, True): 0.5 + 1 / 64 + 4 / (64 * 256), (8, False): 1.0, (8, True): 1.0}
#: Activations are traced on so few layers, and what a layer adds counts for all.
_FEW_LAYERS = 2


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
        checkpoint_bytes: Bytes per row token that it keeps where activations are recomputed: the inputs of the layers.
        largest_matrix: Elements of its largest weight matrix.
        body_matmul: Elements of the body's weight matrices that every token is multiplied with.
        head_elements: Elements of the head's matrix.
        vocab: Vocabulary size.
        hidden: Width.
        layers: Depth.
        max_positions: Longest sequence that the model was made for, or ``None``.
        head_trains: Whether the head's matrix is trained.
        exact: Whether activations were traced, or estimated by formula.
        itemsize: Bytes of an element of the frozen or trained weights, before quantisation.
        quantised: Whether frozen matrices are quantised.
    """

    name: str
    num_parameters: int
    num_trainable: int
    weight_bytes: int
    trainable_bytes: int
    cast_bytes: int
    activation_bytes: float
    checkpoint_bytes: float
    largest_matrix: int
    body_matmul: int
    head_elements: int
    vocab: int
    hidden: int
    layers: int
    max_positions: int | None
    head_trains: bool
    exact: bool
    itemsize: int = 4
    quantised: bool = False


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
    nested: bool = False,
) -> Shape:
    """Measure a model without its weights.

    Args:
        config: Configuration of a causal language model.
        name: For messages.
        dtype: Type that the weights are loaded in.
        lora: A ``peft.PeftConfig``, or ``None`` for all weights.
        half: Whether training runs under bf16 autocast.
        bits: 4 or 8 where frozen matrices are quantised.
        nested: Whether the constants of the quantisation are quantised too.

    Returns:
        Sizes; parameters are exact, activations traced with PyTorch's own scaled-dot-product attention.

    Raises:
        ModelError: The configuration is not one of a causal language model.
    """
    import torch

    kind = getattr(torch, dtype if dtype in ("bfloat16", "float16") else "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model: Any = empty_model(config, kind)
            if lora is not None:
                from peft import get_peft_model

                model = get_peft_model(model, copy.deepcopy(lora))
        except Exception as error:
            said = " ".join(str(error).split())[:160]
            raise ModelError(f"no causal language model can be built ({said})", where=name or "config") from error
    shape = shape_of_model(model, name=name, half=half)
    if bits is None:
        return shape
    frozen = [p for p in _matrices(model) if not p.requires_grad]
    saved = round(sum(p.numel() * (p.element_size() - _QUANTISED_BYTES[bits, nested]) for p in frozen))
    return replace(shape, weight_bytes=shape.weight_bytes - saved, quantised=True)


def shape_of_model(model: Any, *, name: str = "", half: bool = False, per_token: float | None = None) -> Shape:
    """The same of a model that is there, or of one without memory.

    Args:
        model: A causal language model, or a ``peft.PeftModel`` of one.
        name: For messages.
        half: Whether training runs under bf16 autocast.
        per_token: Bytes of activations per token, for a model whose configuration cannot be traced.
    """
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config
    text = config.get_text_config()
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    head = base.get_output_embeddings()
    weight = None if head is None else getattr(head, "weight", None)
    matrices = _matrices(model)
    kinds = [p.dtype for p in parameters if p.is_floating_point() and (p.requires_grad is False or base is model)]
    kind = kinds[0] if kinds else torch.float32
    cast = [*matrices, *([] if weight is None else [weight])] if half and kind is torch.float32 else []
    adapters = dict(getattr(model, "peft_config", None) or {}) if base is not model else {}
    traced = _traced(config, kind, half, next(iter(adapters.values()), None))
    # Four bits to a byte and eight to one: what bitsandbytes holds of a quantised matrix are its packed bytes.
    packed = {id(p): int(p.quant_state.shape.numel()) for p in matrices if hasattr(p, "quant_state") and p.quant_state}
    known = traced if traced is not None else per_token
    return Shape(
        name=name,
        num_parameters=sum(packed.get(id(p), p.numel()) for p in parameters),
        num_trainable=sum(p.numel() for p in trainable),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        trainable_bytes=sum(p.numel() * p.element_size() for p in trainable),
        # Autocast caches the copies of weights that require a gradient, and makes the others anew at each use.
        cast_bytes=sum(2 * p.numel() for p in cast if p.requires_grad),
        activation_bytes=known or _by_formula(text, half),
        # The residual stream has the type of the weights.
        checkpoint_bytes=float(int(text.num_hidden_layers) * int(text.hidden_size) * kind.itemsize),
        largest_matrix=max((packed.get(id(p), p.numel()) for p in matrices), default=0),
        body_matmul=sum(packed.get(id(p), p.numel()) for p in matrices),
        head_elements=0 if weight is None else weight.numel(),
        vocab=int(text.vocab_size),
        hidden=int(text.hidden_size),
        layers=int(text.num_hidden_layers),
        max_positions=getattr(text, "max_position_embeddings", None),
        head_trains=weight is not None and weight.requires_grad,
        exact=traced is not None,
        itemsize=kind.itemsize,
        quantised=bool(packed),
    )


def _matrices(model: Any) -> list[Any]:
    """Weight matrices of the body: everything of two axes but embedding and head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = (base.get_output_embeddings(), base.get_input_embeddings())
    skipped = {id(getattr(module, "weight", None)) for module in ends if module is not None}
    return [p for p in model.parameters() if p.dim() >= 2 and id(p) not in skipped]


def _traced(config: Any, kind: Any, half: bool, lora: Any) -> float | None:
    """Bytes per token that the body keeps, from few layers where all are alike; ``None`` where tracing fails."""
    layers = int(config.get_text_config().num_hidden_layers)
    counts = [layers] if layers <= 2 * _FEW_LAYERS else [_FEW_LAYERS, 2 * _FEW_LAYERS]
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for count in counts:
            try:
                base: Any = empty_model(_shortened(config, count), kind)
                if lora is not None:
                    from peft import get_peft_model

                    base = get_peft_model(base, copy.deepcopy(lora)).get_base_model()
                traced = _activation_bytes(base, kind, half, lora is not None)
            except Exception:
                # Whatever a model's own code makes of a changed number of layers: there is the formula.
                traced = None
            if traced is None:
                return None
            found.append(traced)
    if len(found) == 1:
        return found[0]
    each = (found[1] - found[0]) / _FEW_LAYERS
    return found[0] + each * (layers - _FEW_LAYERS)


def _shortened(config: Any, layers: int) -> Any:
    """The configuration with its first layers alone."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    whole = int(text.num_hidden_layers)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return short


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
