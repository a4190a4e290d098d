"""Log-probs of given completions under one model: packed rows, shared prompts, kept in the store.

Sequences go in as items, lists of (prompt, completion) that belong together: the two answers of a pair, or all samples
of a prompt. Equal prompts of one item are computed once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from preftune.errors import ModelError
from preftune.models.forward import RowForward
from preftune.models.gate import Verdict, check_declared, probe
from preftune.models.head import base_model, probe_head
from preftune.packing import Branch, Tree, build_row
from preftune.references.fingerprint import model_weights_key, sequence_keys, trained_adapter
from preftune.references.store import ReferenceStore

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
#: (prompt, completion) of sequences that belong together.
Item = Sequence[tuple[Ids, Ids]]

#: Longer rows do not run faster.
_MOST_TOKENS = {"cpu": 4096, "cuda": 16384}
_ITEMS_PER_CHUNK = 512
#: What an interrupted pass loses at most, in seconds.
_SECONDS_BETWEEN_WRITES = 5.0


class Scorer:
    """One model, prepared to score items.

    Args:
        model: A causal language model of transformers, PEFT-wrapped or not; put into evaluation mode.
        store: Where log-probs are kept; ``None`` keeps nothing.
        adapter_off: Score the model underneath the adapter.
        bf16: Compute in bfloat16 by autocast.
        packing_mode: ``auto``, ``packed`` or ``padded``.
        backend: Attention of the packed path.
        pad_token_id: Fills padded batches.
        max_tokens: Token budget of a row, by default the device's.
        max_length: Longest sequence, for position encodings that depend on it.
        like: A scorer whose verdict on packing holds for this model too, if class and configuration are the same.
        show_progress: Draw progress bars.

    Attributes:
        adapter_off: Whether it scores the model underneath the adapter.
        num_scored: Items computed so far.
        num_found: Items found in the store so far.
    """

    def __init__(
        self,
        model: Any,
        *,
        store: ReferenceStore | None = None,
        adapter_off: bool = False,
        bf16: bool = False,
        packing_mode: str = "auto",
        backend: str = "auto",
        pad_token_id: int = 0,
        max_tokens: int | None = None,
        max_length: int | None = None,
        like: Scorer | None = None,
        show_progress: bool = False,
    ) -> None:
        self.model = model.eval()
        self.store = store
        self.num_scored = 0
        self.num_found = 0
        self.adapter_off = adapter_off
        self._bf16 = bf16
        self._show = show_progress
        self._key: str | None = None
        self.device = next(model.parameters()).device
        self._max_tokens = max_tokens or _MOST_TOKENS.get(self.device.type, 8192)
        self.verdict = self._verdict(packing_mode, backend, pad_token_id, max_length, like)
        head = like.forward.head if like is not None and like.model is model else probe_head(model)
        alone = self.verdict.alone
        self.forward: RowForward = RowForward(model, self.verdict.ok, backend, head, pad_token_id, alone=alone)

    def _verdict(self, mode: str, backend: str, pad: int, max_length: int | None, like: Scorer | None) -> Verdict:
        if like is not None and _same_kind(like.model, self.model):
            return like.verdict
        verdict = check_declared(self.model, max_length=max_length)
        if mode == "padded":
            verdict = replace(verdict, ok=False, reason="asked for by packing_mode: padded")
        elif verdict.ok:
            verdict = probe(self.model, backend=backend, pad_token_id=pad)
        if mode == "packed" and not verdict.ok:
            raise ModelError(verdict.reason, where="packing_mode", value="packed", remedy="use packing_mode: auto")
        return verdict

    @property
    def weights_key(self) -> str:
        """Content key of the model, the same that a trainer's reference has."""
        if self._key is None:
            adapter = None if self.adapter_off else trained_adapter(self.model)
            compute = {"mixed_precision": "bf16" if self._bf16 else "no"}
            self._key = model_weights_key(self.model, compute, adapter=adapter)
        return self._key

    def autocast(self) -> AbstractContextManager[Any]:
        """The region that all of the model's arithmetic runs in."""
        return torch.autocast(self.device.type, torch.bfloat16) if self._bf16 else nullcontext()

    @contextmanager
    def running(self) -> Iterator[Any]:
        """The model with its adapter on or off, as this scorer means it, without graph."""
        off = self.model.disable_adapter() if self.adapter_off else nullcontext()
        with off, torch.no_grad(), self.autocast():
            yield self.model

    def logps(self, items: Sequence[Item], description: str = "Scoring") -> list[list[Floats]]:
        """Log-probs of every completion token, from the store where known.

        Args:
            items: Sequences that belong together.
            description: Title of the progress bar.

        Returns:
            Per item and sequence, the natural log-prob of each scored token; the first token of a sequence without a
            prompt is not scored.

        Raises:
            ModelError: A token id is beyond the model's vocabulary.
        """
        return self._values(items, description, tail=False)

    def tails(self, items: Sequence[Item], description: str = "Scoring") -> list[list[Floats]]:
        """How far out every completion token lies in the model's distribution; see ``TokenScores.tail``.

        Log-probs come along and are in the store afterwards.

        Args:
            items: Sequences that belong together.
            description: Title of the progress bar.

        Returns:
            Per item and sequence, the tail probability of each scored token.

        Raises:
            ModelError: A token id is beyond the model's vocabulary.
        """
        return self._values(items, description, tail=True)

    def _values(self, items: Sequence[Item], description: str, *, tail: bool) -> list[list[Floats]]:
        self._check_vocabulary(items)
        out: list[list[Floats]] = []
        with tqdm(total=len(items), desc=description, unit="item", disable=None if self._show else True) as bar:
            for start in range(0, len(items), _ITEMS_PER_CHUNK):
                out += self._chunk(items[start : start + _ITEMS_PER_CHUNK], bar, tail)
        return out

    def sums(self, items: Sequence[Item], description: str = "Scoring") -> npt.NDArray[np.float64]:
        """Log-probs of whole completions, ``(items, sequences)``; every item has as many sequences."""
        values = self.logps(items, description)
        return np.array([[each.sum(dtype=np.float64) for each in item] for item in values]).reshape(len(items), -1)

    def _check_vocabulary(self, items: Sequence[Item]) -> None:
        rows = base_model(self.model).get_input_embeddings().weight.shape[0]
        largest = max((int(ids.max(initial=0)) for item in items for pair in item for ids in pair), default=0)
        if largest >= rows:
            raise ModelError(
                "the data hold token ids that this model does not have",
                where=str(getattr(base_model(self.model).config, "_name_or_path", "") or "model"),
                value=largest,
                allowed=f"below {rows}",
                remedy="policy, reference and tokenizer have to share one vocabulary",
            )

    def _chunk(self, items: Sequence[Item], bar: Any, tail: bool) -> list[list[Floats]]:
        keys = _keys(items)
        if tail:
            keys = [tuple(map(_tail_key, each)) for each in keys]
        known: dict[bytes, Floats] = {}
        if self.store is not None:
            known.update(self.store.get_many(self.weights_key, [key for each in keys for key in each]))
        # Equal items are scored once.
        missing = {each: n for n, each in enumerate(keys) if any(key not in known for key in each)}
        self.num_found += len(items) - len(missing)
        bar.update(len(items) - len(missing))
        numbers = list(missing.values())
        fresh: dict[bytes, Floats] = {}
        written = time.monotonic()
        with self.running(), self.forward.active():
            try:
                for row_items in self._plan([items[n] for n in numbers]):
                    chosen = [numbers[k] for k in row_items]
                    fresh.update(self._row([items[n] for n in chosen], tail))
                    bar.update(len(chosen))
                    if time.monotonic() - written > _SECONDS_BETWEEN_WRITES:
                        known.update(self._keep(fresh))
                        written = time.monotonic()
            finally:
                # Also after Ctrl-C: what is computed stays computed.
                known.update(self._keep(fresh))
        self.num_scored += len(numbers)
        return [[known[key] for key in each] for each in keys]

    def _keep(self, fresh: dict[bytes, Floats]) -> dict[bytes, Floats]:
        if self.store is not None and fresh:
            self.store.put_many(self.weights_key, fresh)
        done = dict(fresh)
        fresh.clear()
        return done

    def _plan(self, items: Sequence[Item]) -> list[list[int]]:
        lengths = [sum(tree.num_tokens for tree in _trees(item, 0)) for item in items]
        if not items:
            return []
        if self.forward.packed or self.forward.alone:
            return self.forward.rows_of(lengths, self._max_tokens)
        # Padded rows hold items of like length, or most of them would be padding.
        rows: list[list[int]] = [[]]
        longest = [max(len(prompt) + len(completion) for prompt, completion in item) for item in items]
        for number in sorted(range(len(items)), key=lambda n: longest[n]):
            count = sum(len(items[n]) for n in rows[-1]) + len(items[number])
            if rows[-1] and longest[number] * count > self._max_tokens:
                rows.append([])
            rows[-1].append(number)
        return rows

    def _row(self, items: Sequence[Item], tail: bool) -> dict[bytes, Floats]:
        """Log-probs of the sequences of some items, and their tail probabilities if wanted, by key."""
        trees: list[Tree] = []
        keys: list[bytes] = []
        for item, names in zip(items, _keys(items), strict=True):
            trees += _trees(item, len(keys))
            keys += names
        row = build_row(trees, range(len(items)))
        scores = self.forward(row, with_tail=tail)[0]
        # Targets of one sequence stand together and in order, but an item's sequences may be apart.
        order = np.argsort(row.target_slot, kind="stable")
        ends = np.cumsum(np.bincount(row.target_slot, minlength=len(keys)))[:-1]
        found = dict(zip(keys, _split(scores.logps, order, ends), strict=True))
        if scores.tail is not None:
            found |= zip(map(_tail_key, keys), _split(scores.tail, order, ends), strict=True)
        return found


def _split(values: torch.Tensor, order: Any, ends: Any) -> list[Floats]:
    parts = np.split(values.detach().float().cpu().numpy()[order], ends)
    return [np.array(part, dtype=np.float32) for part in parts]


def _tail_key(key: bytes) -> bytes:
    """Key of a sequence's tail probabilities in the store, beside that of its log-probs."""
    return b"tail:" + key


def _same_kind(one: Any, other: Any) -> bool:
    """Whether two models compute alike but for their weights, so that one start-up probe speaks for both."""
    if one is other:
        return True
    first, second = base_model(one), base_model(other)
    drop = ("_name_or_path", "transformers_version")
    configs = [{k: v for k, v in each.config.to_dict().items() if k not in drop} for each in (first, second)]
    return type(first) is type(second) and configs[0] == configs[1] and type(one) is type(other)


def _trees(item: Item, first_slot: int) -> list[Tree]:
    trees: list[Tree] = []
    for slot, (prompt, completion) in enumerate(item, first_slot):
        branch = Branch(completion, slot)
        if trees and len(prompt) and np.array_equal(trees[-1].prefix, prompt):
            trees[-1] = Tree(prompt, (*trees[-1].branches, branch))
        else:
            trees.append(Tree(prompt, (branch,)))
    return trees


def _keys(items: Sequence[Item]) -> list[tuple[bytes, ...]]:
    pairs = [pair for item in items for pair in item]
    if not pairs:
        return []
    sequences = [np.concatenate(pair) for pair in pairs]
    masks = [np.arange(len(ids)) >= max(len(prompt), 1) for ids, (prompt, _) in zip(sequences, pairs, strict=True)]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in sequences])])
    keys = iter(sequence_keys(np.concatenate(sequences), np.concatenate(masks), offsets))
    return [tuple(next(keys) for _ in item) for item in items]
