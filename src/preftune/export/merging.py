"""An adapter merged into its base in fp32, rounded once, and saved as a plain folder of transformers."""

from __future__ import annotations

import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preftune.config import ModelConfig
from preftune.errors import ConfigError, ModelError, SetupError
from preftune.models.loading import Loaded
from preftune.models.tuned import Tuned, attach, load_base, load_tuned

#: What marks a folder as one of ours, which may be written again.
RECORD = "export.json"
DTYPES = ("float32", "bfloat16", "float16")


def load_for_merge(tuned: Tuned, *, qlora_base: str = "dequantized", trust_remote_code: bool = False) -> Loaded:
    """The tuned model in fp32, on the weights that its adapter is going to be merged into.

    Args:
        tuned: What a run left.
        qlora_base: For a base that was quantised in training: ``dequantized``, the weights that the adapter was trained
            on, or ``original``, the weights before quantisation.
        trust_remote_code: Run Python code that comes with the base.

    Returns:
        Model and tokenizer; the model is a ``PeftModel`` for an adapter.

    Raises:
        ModelError: It cannot be loaded.
        SetupError: A library is missing.
    """
    how = ModelConfig(dtype="float32", trust_remote_code=trust_remote_code)
    if not tuned.is_adapter or not tuned.quantised:
        return load_tuned(tuned, how)
    if qlora_base == "original":
        return load_tuned(tuned, how, quantised=False)
    import torch

    loaded = load_base(tuned, how)
    base: Any = loaded.model.dequantize(dtype=torch.float32).float()
    return Loaded(attach(tuned, base, loaded.tokenizer), loaded.tokenizer, None, None)


def merge(model: Any) -> Any:
    """Merge an adapter into the weights under it; a model without adapter comes back as it is.

    Args:
        model: A model, or a ``PeftModel``, which is used up.

    Returns:
        The plain model.

    Raises:
        ModelError: This kind of adapter cannot be merged, or the result is not finite.
    """
    if not hasattr(model, "peft_config"):
        return model
    kind = str(getattr(model.active_peft_config, "peft_type", "")).rpartition(".")[2]
    if not hasattr(model.base_model, "merge_and_unload"):
        raise ModelError(
            "this kind of adapter has no weights that could be merged",
            where="adapter_config.json",
            value=kind,
            allowed="LoRA and its relatives",
            remedy="serve the adapter beside its base model",
        )
    try:
        with warnings.catch_warnings():
            # PEFT says that embeddings are no longer tied, which the configuration says too.
            warnings.simplefilter("ignore", UserWarning)
            _untie(model)
            merged = model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"the adapter cannot be merged ({' '.join(str(error).split())[:200]})", where="adapter", value=kind
        ) from error
    return merged.eval()


def _untie(model: Any) -> None:
    """Part embeddings and head that share their weights where an adapter changes one of them.

    Merging into shared weights would change both.
    """
    import torch

    config = model.config.get_text_config()
    entry, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or entry is None or not getattr(config, "tie_word_embeddings", False):
        return
    below = getattr(head, "base_layer", head)
    weight: Any = getattr(getattr(entry, "base_layer", entry), "weight", None)
    if not (hasattr(entry, "base_layer") or hasattr(head, "base_layer")):
        return
    if weight is not None and any(each is weight for each in below.parameters(recurse=False)):
        below.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
        config.tie_word_embeddings = model.config.tie_word_embeddings = False


def rounded(model: Any, dtype: str) -> Any:
    """Round the weights to a type.

    Raises:
        ModelError: A weight is too large for the type.
    """
    import torch

    kind = getattr(torch, dtype)
    if kind is torch.float16:
        most = torch.finfo(kind).max
        for name, weight in model.named_parameters():
            if weight.is_floating_point() and float(weight.detach().abs().max()) > most:
                raise ModelError("a weight is too large for float16", where=name, remedy="use --dtype bfloat16")
    return model.to(kind)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write weights, configuration, generation settings, tokenizer and chat template.

    The generation settings end a text wherever ``preftune`` does: at the tokenizer's end token too.

    Args:
        model: A plain model.
        tokenizer: Its tokenizer.
        folder: Where to write.

    Raises:
        SetupError: It cannot be written.
    """
    from safetensors import SafetensorError

    generation = getattr(model, "generation_config", None)
    if generation is not None:
        listed = generation.eos_token_id
        known = [listed] if isinstance(listed, int) else list(listed or [])
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in known:
            known.append(int(tokenizer.eos_token_id))
        generation.eos_token_id = known[0] if len(known) == 1 else known or None
        if any(getattr(generation, name, None) is not None for name in ("temperature", "top_p", "top_k", "min_p")):
            # Without it such a file loads, and cannot be saved again.
            generation.do_sample = True
    try:
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    except SafetensorError as error:
        raise SetupError(
            f"cannot write the weights ({' '.join(str(error).split())[:120]})",
            where=str(folder),
            remedy="free some space, or set another output_dir",
        ) from error


@contextmanager
def new_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to fill, which takes the name ``target`` when the block ends well and vanishes otherwise.

    Args:
        target: Its name in the end.
        overwrite: Replace an earlier export.

    Raises:
        ConfigError: Something else has that name.
        SetupError: It cannot be made.
    """
    check_target(target, overwrite=overwrite)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise SetupError(
            f"cannot make the folder ({error.strerror})", where="--output_dir", value=str(target)
        ) from error
    try:
        yield beside
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Find out before the work that its result would have no place.

    Raises:
        ConfigError: Something else has that name.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    ours = (target / RECORD).is_file()
    if not (ours and overwrite):
        remedy = "add --overwrite, or give another --output_dir" if ours else "give another --output_dir"
        raise ConfigError("there is something already", where="--output_dir", value=str(target), remedy=remedy)
