"""Content keys: which sequence, scored under which weights.

A stored reference log-prob may be used again exactly when nothing that went into it has changed. Two keys say so:

* :func:`sequence_key` covers the token ids and which of them are scored. Prompt text, template, truncation and
  tokenizer act on a log-prob only through these, so they need no key of their own.
* :func:`weights_key` covers every tensor of the reference (name, dtype, shape, bytes) and whatever else the caller
  says changes log-probs: architecture, rotary settings, compute dtype.

Loss, beta, learning rate, output folder and the order of rows enter neither, so they can never cause a miss.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import xxhash

from preftune.errors import DataError, StoreError
from preftune.references import names

if TYPE_CHECKING:
    import torch

# Part of every key: raise it when the stored numbers change, last digits included, so that older entries stop matching.
SCHEME = "preftune-reference-2"
_PERSON = b"preftune-seq-1"
_CHUNK_BYTES = 64 << 20
_MAX_THREADS = 8

# Config entries that have no influence on log-probs but differ between machines, library versions and moments of a
# run. The special-token ids are here because trainers align them with the tokenizer after the model is loaded.
_VOLATILE = frozenset(
    {
        *("architectures", "attn_implementation", "auto_map", "bos_token_id", "chunk_size_feed_forward"),
        *("decoder_start_token_id", "dtype", "eos_token_id", "finetuning_task", "gradient_checkpointing", "id2label"),
        *("label2id", "name_or_path", "output_attentions", "output_hidden_states", "output_router_logits"),
        *("pad_token_id", "prefix", "problem_type", "return_dict", "router_aux_loss_coef", "sep_token_id"),
        *("task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version", "transformers_weights"),
        *("unsloth_version", "use_cache", "use_return_dict"),
    }
)
# The same for a PEFT configuration: dropout is off while the reference is scored.
_VOLATILE_PEFT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision"),
        "task_type",
    }
)
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})


def sequence_key(input_ids: Any, completion_mask: Any) -> bytes:
    """Return the 16-byte content key of one sequence.

    Args:
        input_ids: Token ids, shape ``(n,)``, without padding: list, numpy array or tensor.
        completion_mask: Which tokens are scored, shape ``(n,)``, of 0/1 or booleans.

    Returns:
        BLAKE2b digest, the same for every container and integer type that holds the same numbers.

    Raises:
        DataError: If the two are not one-dimensional integers of equal length, or an id is negative.
    """
    ids = _as_numpy(input_ids, "input_ids")
    return sequence_keys(ids, completion_mask, np.array([0, ids.size], dtype=np.int64))[0]


def sequence_keys(input_ids: Any, completion_mask: Any, offsets: Any) -> list[bytes]:
    """Return the keys of many sequences that stand behind one another in flat arrays.

    Args:
        input_ids: Token ids of all sequences, shape ``(total,)``.
        completion_mask: Which tokens are scored, shape ``(total,)``.
        offsets: Where each sequence starts, and the end of the last, shape ``(num_sequences + 1,)``.

    Returns:
        One key per sequence, equal to :func:`sequence_key` of each alone.

    Raises:
        DataError: If shapes, types or offsets do not fit one another.
    """
    ids = _as_numpy(input_ids, "input_ids")
    mask = _as_numpy(completion_mask, "completion_mask")
    bounds = _as_numpy(offsets, "offsets")
    _check_sequences(ids, mask, bounds)
    # One record per token, id then mask: fixed width, so no two different sequences share their bytes.
    records = np.empty((ids.size, 5), dtype=np.uint8)
    records[:, :4] = ids.astype("<i4").reshape(-1, 1).view(np.uint8)
    records[:, 4] = mask
    view = records.reshape(-1).data
    marks = (5 * bounds.astype(np.int64)).tolist()
    blake2b = hashlib.blake2b
    return [
        blake2b(view[start:end], digest_size=16, person=_PERSON).digest() for start, end in itertools.pairwise(marks)
    ]


def _as_numpy(values: Any, where: str) -> npt.NDArray[Any]:
    if hasattr(values, "detach"):  # a tensor; torch itself is not imported here
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.size == 0 and array.ndim == 1:
        return array.astype(np.int64)  # an empty list has no integer type of its own
    if array.ndim != 1 or array.dtype.kind not in "iub":
        shape = f"{array.dtype} of shape {array.shape}"
        raise DataError("Expected one-dimensional integers", where=where, value=shape)
    return array


def _check_sequences(ids: npt.NDArray[Any], mask: npt.NDArray[Any], offsets: npt.NDArray[Any]) -> None:
    if ids.shape != mask.shape:
        raise DataError(
            "The mask does not have one entry per token",
            where="completion_mask",
            value=int(mask.size),
            allowed=str(ids.size),
        )
    if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(np.int32).max):
        raise DataError(
            "A token id is out of range",
            where="input_ids",
            value=int(ids.min() if ids.min() < 0 else ids.max()),
            allowed="0 to 2147483647",
            remedy="Remove padding before keys are made",
        )
    if mask.size and (mask.min() < 0 or mask.max() > 1):
        raise DataError("A mask entry is neither 0 nor 1", where="completion_mask", value=int(mask.max()))
    if offsets.size < 1 or offsets[0] != 0 or offsets[-1] != ids.size or (np.diff(offsets.astype(np.int64)) < 0).any():
        raise DataError(
            "The offsets do not partition the tokens", where="offsets", allowed=f"ascending from 0 to {ids.size}"
        )


def weights_key(
    named_tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    extra: Mapping[str, Any],
    *,
    adapter: str | None = None,
) -> str:
    """Return the content key of a reference model.

    A model and the same model inside a PEFT wrapper whose adapter is off share a key. Tied tensors count once,
    under the name met first.

    Args:
        named_tensors: ``state_dict()`` or ``named_parameters()`` of the reference. Sharded tensors are gathered,
            which every process of the group must take part in.
        extra: Whatever else changes log-probs, as JSON-like values: model config, compute dtype, adapter config.
        adapter: Name of the PEFT adapter that belongs to the reference; ``None`` means that adapters are off.

    Returns:
        32 hexadecimal digits.

    Raises:
        StoreError: If a tensor has no data to hash, or ``extra`` holds a value without a stable text form.
    """
    pairs = list(named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors)
    names = normalise_names([name for name, _ in pairs], adapter)
    chosen: dict[str, torch.Tensor] = {}
    seen: set[Any] = set()
    for name, tensor in pairs:
        if name not in names:
            continue
        identity = _identity(name, tensor)
        if identity not in seen:
            seen.add(identity)
            chosen[names[name]] = tensor
    total = xxhash.xxh3_128()
    total.update(f"{SCHEME}\n{canonical_json(extra)}\n".encode())
    for name, digest in sorted(_digests(chosen)):
        total.update(f"{name}\t{digest}\n".encode())
    return total.hexdigest()


def model_weights_key(model: Any, compute: Mapping[str, Any], *, adapter: str | None = None) -> str:
    """Return :func:`weights_key` of a transformers or PEFT model with its own configuration as ``extra``.

    Args:
        model: The reference, as it will be run.
        compute: How it will be run: compute dtype, autocast mode, anything else that changes the last digits.
        adapter: Name of the PEFT adapter that stays on while scoring; ``None`` when adapters are off.

    Returns:
        32 hexadecimal digits.

    Raises:
        StoreError: If adapters are merged into the weights, an unknown adapter is named, or a tensor has no data.
    """
    configs = getattr(model, "peft_config", None) or {}
    if adapter is not None and adapter not in configs:
        raise StoreError("The reference names an adapter that the model lacks", value=adapter, allowed=str([*configs]))
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise StoreError("Adapters are merged into the reference weights", remedy="Call unmerge_adapter() first")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    extra: dict[str, Any] = {
        "class": type(base).__name__,
        "config": stable_config(base.config.to_dict()),
        "compute": dict(compute),
    }
    if adapter is not None:
        settings = configs[adapter].to_dict()
        extra["adapter"] = {key: value for key, value in settings.items() if key not in _VOLATILE_PEFT}
    key = weights_key(model.state_dict(keep_vars=True), extra, adapter=adapter)
    names.call(key, str(getattr(base.config, "_name_or_path", "")) + (f", adapter {adapter}" if adapter else ""))
    return key


def stable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model configuration without the entries that do not change log-probs.

    Args:
        config: ``model.config.to_dict()``.

    Returns:
        The rest, nested configurations included: private keys, paths, versions, dtype labels, cache and attention
        implementation settings and special-token ids are gone. Unknown keys stay, since a needless miss costs time
        but a false hit costs the result.
    """
    return {
        key: stable_config(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _VOLATILE and not str(key).startswith("_")
    }


def canonical_json(value: Any) -> str:
    """Return one text per content: keys sorted, no dependence on insertion order, set order or memory addresses.

    Args:
        value: Nested mappings, sequences, sets, numbers, strings, dtypes, enums and paths.

    Returns:
        Compact JSON.

    Raises:
        StoreError: For objects without a stable text form.
    """
    return json.dumps(_plain(value, "extra"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value.value if isinstance(value, Enum) else value  # an enum may derive from str or int
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item, where) for item in value), key=lambda item: json.dumps(item, sort_keys=True))
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_plain(item, where) for item in value]
    if isinstance(value, (bytes, bytearray)):
        return value.hex()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict(), where)
    if isinstance(value, Enum):
        return _plain(value.value, where)
    if type(value).__module__ == "torch":
        return str(value)  # dtypes, devices, sizes
    raise StoreError(
        "This value has no stable text form to key stored log-probs on",
        where=where,
        value=type(value).__name__,
        allowed="numbers, strings, lists, mappings, dtypes, paths, enums",
    )


def normalise_names(names: Sequence[str], adapter: str | None = None) -> dict[str, str]:
    """Map each tensor name that belongs to the reference to its name in the plain, unwrapped model.

    PEFT keeps the wrapped layer under ``base_layer`` or ``original_module``; whatever else stands beside it is an
    adapter's. The rule follows that structure, not a list of adapter kinds, so it holds for all of them.

    Args:
        names: All names of one model.
        adapter: The adapter that stays on; its name is removed, so that copies of one adapter share a key.

    Returns:
        Original name to plain name; tensors that play no part are absent.
    """
    stripped = {name: _strip_wrappers(name) for name in names}
    layers: set[tuple[str, ...]] = set()
    replaced: set[tuple[str, ...]] = set()
    for parts in stripped.values():
        for i, part in enumerate(parts):
            if part in ("base_layer", "original_module"):
                layers.add(parts[:i])
            if part == "modules_to_save" and adapter is not None and parts[i + 1 : i + 2] == (adapter,):
                replaced.add(parts[:i])
    plain = ((name, _plain_name(parts, layers, replaced, adapter)) for name, parts in stripped.items())
    return {name: result for name, result in plain if result is not None}


def _strip_wrappers(name: str) -> tuple[str, ...]:
    parts = tuple(part for part in name.split(".") if part not in _WRAPPERS)
    if parts[:1] == ("module",):
        parts = parts[1:]
    return parts[2:] if parts[:2] == ("base_model", "model") else parts


def _plain_name(
    parts: tuple[str, ...], layers: set[tuple[str, ...]], replaced: set[tuple[str, ...]], adapter: str | None
) -> str | None:
    kept: list[str] = []
    for i, part in enumerate(parts):
        if parts[:i] not in layers:
            kept.append(part)
        elif part in ("base_layer", "original_module"):
            if parts[:i] in replaced:
                return None  # a saved module stands in for this one
        elif adapter is not None and adapter in parts[i:]:
            rest = list(parts[i:])
            rest.remove(adapter)
            kept += rest[1:] if rest[0] == "modules_to_save" else rest
            break
        else:
            return None
    return ".".join(part for part in kept if part != "token_adapter")


def _identity(name: str, tensor: torch.Tensor) -> Any:
    if tensor.is_meta or hasattr(tensor, "ds_id"):
        raise StoreError(
            "A reference tensor holds no data in this process",
            where=name,
            remedy="Pass a gathered state dict, or turn the reference store off",
        )
    if hasattr(tensor, "full_tensor"):
        tensor = cast(Any, tensor).to_local()
    if tensor.data_ptr() == 0:  # empty, or a wrapper without storage of its own: nothing to compare
        return (name,)
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device


def _digests(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    """Yield ``(name, digest)``; hashing releases the interpreter lock, so threads share the work."""
    workers = max(1, min(_MAX_THREADS, _num_cores()))
    waiting: deque[tuple[str, Future[str]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for name, tensor in tensors.items():
            data = tensor.detach()
            if hasattr(data, "full_tensor"):
                # A collective: every process has to reach its gathers in the same order, hence not in the pool.
                data = data.full_tensor()
            waiting.append((name, pool.submit(_digest, name, data)))
            if len(waiting) > 2 * workers:  # bounds the gathered copies alive at once
                done, future = waiting.popleft()
                yield done, future.result()
        for name, future in waiting:
            yield name, future.result()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _digest(name: str, tensor: torch.Tensor) -> str:
    import torch

    digest = xxhash.xxh3_128(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    try:
        flat = tensor.reshape(-1)
        step = max(1, _CHUNK_BYTES // flat.element_size())
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step].cpu().contiguous().view(torch.uint8)
            digest.update(part.numpy().data)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise StoreError(
            f"This kind of tensor cannot be hashed ({error})",
            where=name,
            value=type(tensor).__name__,
            remedy="Turn the reference store off for this model",
        ) from error
    return digest.hexdigest()


def trained_adapter(model: Any) -> str | None:
    """Name of the active adapter where it changes the model's output; ``None`` for no adapter or a fresh one."""
    names = getattr(model, "active_adapters", None)
    if not hasattr(model, "peft_config") or not names:
        return None
    ups = [p for name, p in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    if ups and not any(bool(p.detach().any()) for p in ups):
        return None
    return str(names[0])
