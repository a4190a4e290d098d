"""Token by token: prompts of many lengths, with and without the adapter, continued in one batch.

Prompts are read in groups of like length, so that little of the work is padding, and their key-value caches are joined
into one with room for all tokens to come: nothing is copied when a token is added, and a row that ends gives its place
to the last one. What cannot be joined (sliding windows, states) is read in one padded batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from preftune.kernels.device import put, widened

#: What PEFT calls the model under all adapters.
BASE = "__base__"
#: Most tokens that are read at once, padding included.
_MOST_READ = 4096
#: Prompts share a group as long as no more than this share of it is padding.
_MOST_PADDING = 0.1
#: Most rows of a batch where more of them take as much longer.
_MOST_ROWS = {"cpu": 64}
#: Most bytes of keys and values on a machine without accelerator, and the share of what is free on one with it.
_MOST_BYTES, _SHARE_OF_FREE = 2 << 30, 0.25

Drawn = list[tuple[int, int, float]]


def without_graph(model: Any) -> AbstractContextManager[Any]:
    """Inference mode; where FSDP2 shards a model, what is gathered in it could not be trained on afterwards."""
    return torch.no_grad() if hasattr(model, "unshard") else torch.inference_mode()


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    uniforms: np.ndarray[Any, np.dtype[np.float64]],
    temperature: float,
    ends: frozenset[int],
    *,
    adapters: Sequence[str] | None = None,
) -> Iterator[Drawn]:
    """Continue prompts, all of them by one token at a time.

    Args:
        model: A causal language model in evaluation mode.
        prompts: Token ids of each row, at least one.
        uniforms: Random numbers, ``(rows, most tokens)``.
        temperature: Divides the logits; 0 takes the most likely token.
        ends: Tokens that end a row.
        adapters: Adapter of each row, :data:`BASE` for none; see :func:`switchable`.

    Yields:
        ``(row, token, log-prob)`` of each row that goes on, until all have ended or have their most tokens.
    """
    with without_graph(model):
        batch = _Batch(model, prompts, adapters, room=uniforms.shape[1])
    draws = put(uniforms, model.device)
    end_ids = torch.tensor(sorted(ends), device=model.device)
    for step in range(uniforms.shape[1]):
        with without_graph(model):
            chosen, logps = choose(widened(batch.logits), draws[batch.rows, step], temperature)
            going_on = ~torch.isin(chosen, end_ids)
        yield list(zip(batch.rows.tolist(), chosen.tolist(), logps.tolist(), strict=True))
        if step + 1 == uniforms.shape[1] or not bool(going_on.any()):
            return
        with without_graph(model):
            batch.advance(chosen, going_on)


def choose(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens by inverse transform, and their log-probs at temperature 1; logits are wide `(rows, vocabulary)`."""
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    weights = shifted.exp()
    total = weights.sum(dim=-1)
    if temperature == 0:
        chosen = shifted.argmax(dim=-1)
    else:
        cumulated = (weights if temperature == 1 else (shifted / temperature).exp()).cumsum(dim=-1)
        # right=True: a token of probability 0 is never taken, not even for a draw of exactly 0.
        chosen = torch.searchsorted(cumulated, (uniforms[:, None] * cumulated[:, -1:]), right=True).squeeze(1)
        chosen = chosen.clamp(max=logits.shape[-1] - 1)
    return chosen, shifted.gather(1, chosen[:, None]).squeeze(1) - total.log()


class _Batch:
    """Rows that go on, their cache, and the logits of their next tokens."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], adapters: Sequence[str] | None, room: int) -> None:
        self.model = model
        self._adapters = None if adapters is None else list(adapters)
        self._room = room
        groups = _groups([len(ids) for ids in prompts])
        caches: list[Any] = []
        logits: list[torch.Tensor] = []
        for group in groups:
            output = self._read(prompts, group)
            if not _joinable(output.past_key_values):
                # One batch for all of them, as the model knows it.
                groups = [list(range(len(prompts)))]
                output = self._read(prompts, groups[0])
                caches, logits = [output.past_key_values], [output.logits[:, -1]]
                break
            caches.append(output.past_key_values)
            logits.append(output.logits[:, -1])
        order = [row for group in groups for row in group]
        width = max(len(ids) for ids in prompts)
        self.rows = torch.tensor(order, device=model.device)
        self.logits = torch.cat(logits)
        self.cache = _joined(caches, width, room) if _joinable(caches[0]) else caches[0]
        self.mask = _left_padded([[1] * len(prompts[row]) for row in order], model.device)
        self.padded = bool((self.mask == 0).any())

    def _read(self, prompts: Sequence[Sequence[int]], group: Sequence[int]) -> Any:
        chosen = [list(prompts[row]) for row in group]
        mask = _left_padded([[1] * len(ids) for ids in chosen], self.model.device)
        # Padding tokens are masked, so their id does not matter.
        return self._forward(_left_padded(chosen, self.model.device), mask, group, None)

    def _forward(self, tokens: torch.Tensor, mask: torch.Tensor, rows: Sequence[int], cache: Any) -> Any:
        extra: dict[str, Any] = {}
        if bool((mask == 0).any()):
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            extra = {"attention_mask": mask, "position_ids": positions}
        if self._adapters is not None:
            extra["adapter_names"] = [self._adapters[row] for row in rows]
        return self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)

    def advance(self, chosen: torch.Tensor, going_on: torch.Tensor) -> None:
        """Add a token to every row that goes on; the others leave."""
        if not bool(going_on.all()):
            order = _without_holes(going_on.tolist())
            kept = torch.tensor(order, device=self.rows.device)
            self.rows, chosen, self.mask = self.rows[kept], chosen[kept], self.mask[kept]
            if all(isinstance(layer, _Roomy) for layer in self.cache.layers):
                for layer in self.cache.layers:
                    layer.move(order)
            else:
                self.cache.batch_select_indices(kept)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        output = self._forward(chosen[:, None], self.mask, self.rows.tolist(), self.cache)
        self.cache, self.logits = output.past_key_values, output.logits[:, -1]


class _Roomy(DynamicLayer):
    """A layer's keys and values with room for tokens to come."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._keys, self._values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = self._keys[:, :, :length], self._values[:, :, :length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write behind what is there."""
        assert self.keys is not None
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        self._keys[:, :, start:end], self._values[:, :, start:end] = key_states, value_states
        self._show(end)
        assert self.values is not None
        return self.keys, self.values

    def move(self, order: Sequence[int]) -> None:
        """Keep as many rows as `order` is long; row ``order[n]`` becomes row ``n``."""
        assert self.keys is not None
        for to, source in enumerate(order):
            if to != source:
                self._keys[to], self._values[to] = self._keys[source], self._values[source]
        self._keys, self._values = self._keys[: len(order)], self._values[: len(order)]
        self._show(self.keys.shape[2])


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    """Rows of like length, which are read together."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups:
            group = groups[-1]
            area = (len(group) + 1) * lengths[group[0]]
            padding = area - sum(lengths[n] for n in group) - lengths[row]
            if area <= _MOST_READ and padding <= _MOST_PADDING * area:
                group.append(row)
                continue
        groups.append([row])
    return groups


def _joinable(cache: Any) -> bool:
    """Whether a cache is keys and values of all tokens, and nothing else."""
    return type(cache) is DynamicCache and all(
        isinstance(layer, DynamicLayer) and type(layer) in (DynamicLayer, _Roomy) and layer.is_initialized
        for layer in cache.layers
    )


def _joined(caches: Sequence[Any], width: int, room: int) -> Any:
    """One cache of all rows, padded on the left to ``width``, with room for more."""
    first = caches[0]
    for number in range(len(first.layers)):
        layers = [cache.layers[number] for cache in caches]
        pair = []
        for name in ("keys", "values"):
            parts = [getattr(layer, name) for layer in layers]
            _, heads, _, size = parts[0].shape
            whole = parts[0].new_zeros(sum(part.shape[0] for part in parts), heads, width + room, size)
            start = 0
            for part in parts:
                whole[start : start + part.shape[0], :, width - part.shape[2] : width] = part
                start += part.shape[0]
            pair.append(whole)
        for cache in caches:
            cache.layers[number].keys = cache.layers[number].values = None
        first.layers[number] = _Roomy(pair[0], pair[1], width)
    return first


def _without_holes(alive: Sequence[bool]) -> list[int]:
    """Rows that stay, in an order that moves as few as possible: the last ones fill the places of those that left."""
    count = sum(alive)
    spare = iter([row for row in range(count, len(alive)) if alive[row]])
    return [row if alive[row] else next(spare) for row in range(count)]


def _left_padded(rows: Sequence[Sequence[int]], device: Any) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)


def tokens_that_fit(model: Any) -> int:
    """Tokens of a batch, those to come included, whose keys and values fit into memory together."""
    device = torch.device(model.device)
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    shared = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 1024) // heads
    layers = getattr(config, "num_hidden_layers", None) or 1
    most = _MOST_BYTES
    if device.type == "cuda":
        most = int(torch.cuda.mem_get_info(device)[0] * _SHARE_OF_FREE)
    return max(1, most // max(1, 2 * layers * shared * size * torch.finfo(model.dtype).bits // 8))


def rows_at_once(model: Any, length: int) -> int:
    """How many completions to draw at once where nobody says: as many as fit, up to where more take as much longer.

    Args:
        model: The model.
        length: Tokens of the longest row, those to come included.

    Returns:
        At least 1.
    """
    return max(1, min(tokens_that_fit(model) // max(length, 1), _MOST_ROWS.get(torch.device(model.device).type, 256)))


def switchable(model: Any) -> str | None:
    """Name of the adapter with and without which rows of one batch can run, ``None`` where they cannot.

    A short text is run in one batch and apart: what PEFT cannot do it refuses, or does not do.

    Args:
        model: A model, PEFT-wrapped or not.
    """
    kinds = getattr(model, "peft_config", None)
    if not kinds or len(kinds) != 1 or not hasattr(model, "disable_adapter"):
        return None
    (name,) = kinds
    was_training = bool(model.training)
    model.eval()
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.tensor([[(7 * place + 1) % vocabulary for place in range(4)]], device=model.device)
    hooks = {module: set(module._forward_pre_hooks) for module in model.modules()}
    try:
        with torch.inference_mode():
            together = widened(model(input_ids=ids.repeat(2, 1), adapter_names=[BASE, name]).logits)
            adapted = widened(model(input_ids=ids).logits)
            with model.disable_adapter():
                plain = widened(model(input_ids=ids).logits)
    except (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError, KeyError):
        for module, known in hooks.items():
            # PEFT takes its hooks away again only where nothing fails.
            for key in set(module._forward_pre_hooks) - known:
                module._forward_pre_hooks.pop(key)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        return None
    finally:
        model.train(was_training)
    apart = torch.cat([plain, adapted])
    scale = 1e3 * torch.finfo(model.dtype).eps * float(apart.abs().max().clamp(min=1.0))
    same = float((together - apart).abs().max()) <= scale
    return name if same and math.isfinite(scale) else None
