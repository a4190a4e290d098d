"""Log-probs of given completions under one model: packed rows, shared prompts, kept in the store.

Sequences go in as items, lists of (prompt, completion) that belong together: the two answers of a pair, or all samples
of a prompt. Equal prompts of one item are computed once.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from preftune.errors import SetupError, StoreError
from preftune.kernels.head import TokenScores
from preftune.packing import Branch, PackedRow, Tree, build_row
from preftune.references.fingerprint import sequence_keys
from preftune.references.memory import ran_out_of_memory
from preftune.references.store import ReferenceStore

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
#: Sequences that belong together, each ``(prompt, completion)`` or ``(prompt, completion, scored)``; the last says
#: which tokens of the completion are scored, ``None`` meaning all.
Item = Sequence[tuple[Any, ...]]
_Keys = tuple[bytes, ...]

ITEMS_PER_CHUNK = 512
#: Nats per token by which stored values may differ from what the model computes now: with half precision somewhere, or
#: without. Packed and padded rows of a pretrained model were seen 0.05 apart in bf16; TF32 has fewer digits than fp32.
STORED_AGREEMENT = {True: 0.3, False: 2e-2}
#: What an interrupted pass loses at most, in seconds.
_SECONDS_BETWEEN_WRITES = 5.0


class Packing(Protocol):
    """How a model packs rows.

    Attributes:
        packed: Packed or padded path.
        alone: Whether every item needs a row of its own.
    """

    packed: bool
    alone: bool

    def rows_of(self, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
        """Items of so many tokens by row."""


class SequenceScorer:
    """Scores items under one model, and never one twice.

    Args:
        score: Scores a row, with tail probabilities where asked for.
        packing: Gives the model's packing, when something has to be computed.
        store: Where log-probs are kept; ``None`` keeps nothing.
        weights_key: Gives the content key of the model.
        around: Makes the region that a pass over several rows runs in.
        name: What it is called in messages.
        tolerance: Nats per token that the store's values may differ by from what the model says of one item now;
            ``None`` where it cannot be asked.

    Attributes:
        num_scored: Items computed so far.
        num_found: Items found in the store so far.
    """

    def __init__(
        self,
        score: Callable[[PackedRow, bool], TokenScores],
        packing: Callable[[], Packing],
        *,
        store: ReferenceStore | None = None,
        weights_key: Callable[[], str] = str,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        name: str = "scoring",
        tolerance: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.num_scored = 0
        self.num_found = 0
        self._score = score
        self._packing = packing
        self._store = store
        self._weights_key = weights_key
        self._around = around
        self._name = name
        self._tolerance = tolerance
        self._compared = False
        #: Token budget of rows since memory has run out, or ``None``.
        self._most_tokens: int | None = None

    def values(
        self,
        items: Sequence[Item],
        max_tokens: int,
        *,
        tail: bool = False,
        in_step: Callable[[int], int] | None = None,
        stand_in: Item = (),
        progress: Callable[[int], Any] = lambda number: None,
    ) -> list[list[Floats]]:
        """Log-probs of every completion token, or tail probabilities, from the store where known.

        Args:
            items: Sequences that belong together.
            max_tokens: Token budget of a row.
            tail: Tail probabilities instead; log-probs come along and are in the store afterwards.
            in_step: Gives the largest of a number in all processes, where these have to run equally many rows: a
                sharded model gathers its parameters from all of them.
            stand_in: An item to be run in such a process that has none left.
            progress: Told how many items are done.

        Returns:
            Per item and sequence, the value of each scored token; the first token of a sequence without a prompt is not
            scored.
        """
        keys = item_keys(items)
        if tail:
            keys = [tuple(map(_tail_key, each)) for each in keys]
        known: dict[bytes, Floats] = {}
        if self._store is not None:
            known.update(self._store.get_many(self._weights_key(), [key for each in keys for key in each]))
            if not (self._compared or tail or in_step) and not self._agrees(items, keys, known):
                known = {}
        # Equal items are scored once.
        missing = {each: n for n, each in enumerate(keys) if any(key not in known for key in each)}
        self.num_found += len(items) - len(missing)
        progress(len(items) - len(missing))
        if len(missing) if in_step is None else in_step(len(missing)):
            chosen = [items[n] for n in sorted(missing.values())]
            for values in self._computed(chosen, max_tokens, tail, progress, in_step, stand_in):
                known |= values
        return [[known[key] for key in each] for each in keys]

    def _agrees(self, items: Sequence[Item], keys: Sequence[_Keys], known: dict[bytes, Floats]) -> bool:
        """Whether the model says of one item what the store does; a store that does not is emptied of this model.

        Hooks, patched layers and other versions of a library change what a model computes, and leave its weights and
        configuration as they are.
        """
        whole = [n for n, each in enumerate(keys) if all(key in known and len(known[key]) for key in each)]
        tolerance = self._tolerance() if whole else None
        if tolerance is None or self._store is None:
            return True
        self._compared = True
        number = min(whole, key=lambda n: _num_tokens(items[n]))
        self._packing()
        with self._around():
            fresh = self._scored([items[number]], False)
        apart = max(float(np.abs(fresh[key] - known[key]).mean()) for key in keys[number])
        if apart <= tolerance:
            return True
        warnings.warn(
            f"the log-probs stored for this model differ by {apart:.2g} nats per token from what it computes now, as "
            "after a hook, a patched layer or an update of a library; they are forgotten and computed again",
            UserWarning,
            stacklevel=3,
        )
        try:
            self._store.clear(self._weights_key())
        except StoreError:
            self._store = None
        return False

    def _computed(
        self,
        items: Sequence[Item],
        max_tokens: int,
        tail: bool,
        progress: Callable[[int], Any],
        in_step: Callable[[int], int] | None,
        stand_in: Item,
    ) -> Iterator[dict[bytes, Floats]]:
        fresh: dict[bytes, Floats] = {}
        written = time.monotonic()
        packing = self._packing()
        with self._around():
            try:
                rows = self._rows if in_step is None else partial(self._rows_in_step, in_step, stand_in)
                for numbers, values in rows(packing, items, max_tokens, tail):
                    fresh |= values
                    yield values
                    progress(len(numbers))
                    if time.monotonic() - written > _SECONDS_BETWEEN_WRITES:
                        self._keep(fresh)
                        written = time.monotonic()
            finally:
                # Also after Ctrl-C: what is computed stays computed.
                self._keep(fresh)
        self.num_scored += len(items)

    def _rows(
        self, packing: Packing, items: Sequence[Item], max_tokens: int, tail: bool
    ) -> Iterator[tuple[list[int], dict[bytes, Floats]]]:
        """Items by row and their values, in shorter rows from where memory runs out."""
        left = list(range(len(items)))
        while left:
            most = max_tokens if self._most_tokens is None else min(max_tokens, self._most_tokens)
            done: set[int] = set()
            for places in _plan(packing, [items[n] for n in left], most):
                numbers = [left[place] for place in places]
                values = self._fitting([items[n] for n in numbers], tail)
                if values is None:
                    break
                done.update(numbers)
                yield numbers, values
            left = [n for n in left if n not in done]

    def _rows_in_step(
        self,
        in_step: Callable[[int], int],
        stand_in: Item,
        packing: Packing,
        items: Sequence[Item],
        max_tokens: int,
        tail: bool,
    ) -> Iterator[tuple[list[int], dict[bytes, Floats]]]:
        """Items by row and their values, and then as many rows more as the busiest process has."""
        rows = list(_plan(packing, items, max_tokens)) if items else []
        for numbers in rows:
            yield numbers, self._row([items[n] for n in numbers], tail)
        for _ in range(in_step(len(rows)) - len(rows)):
            self._row([stand_in], tail)

    def _fitting(self, items: Sequence[Item], tail: bool) -> dict[bytes, Floats] | None:
        """Score a row; where memory runs out, halve the rows that are still to come and return ``None``.

        Raises:
            SetupError: The row holds one example alone.
        """
        try:
            return self._row(items, tail)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            num_tokens = sum(map(_num_tokens, items))
            if len(items) == 1:
                raise SetupError(
                    f"memory ran out in a row of {num_tokens} tokens of {self._name}, which holds one example",
                    remedy="lower max_length",
                ) from error
        # Out of the handler, whose traceback holds the activations.
        clear_device_cache(garbage_collection=True)
        self._most_tokens = max(1, num_tokens // 2)
        warnings.warn(
            f"memory ran out in {self._name}; its rows from now on hold up to {self._most_tokens} tokens, and results "
            "stay the same",
            UserWarning,
            stacklevel=2,
        )
        return None

    def _keep(self, fresh: dict[bytes, Floats]) -> None:
        if self._store is not None and fresh:
            self._store.put_many(self._weights_key(), fresh)
        fresh.clear()

    def _row(self, items: Sequence[Item], tail: bool) -> dict[bytes, Floats]:
        """What is not known of some items, by key."""
        return self._scored(items, tail)

    def _scored(self, items: Sequence[Item], tail: bool) -> dict[bytes, Floats]:
        """Log-probs of the sequences of some items, and their tail probabilities if wanted, by key."""
        trees: list[Tree] = []
        keys: list[bytes] = []
        for item, names in zip(items, item_keys(items), strict=True):
            trees += item_trees(item, len(keys))
            keys += names
        row = build_row(trees, range(len(items)))
        scores = self._score(row, tail)
        # Targets of one sequence stand together and in order, but an item's sequences may be apart.
        order = np.argsort(row.target_slot, kind="stable")
        ends = np.cumsum(np.bincount(row.target_slot, minlength=len(keys)))[:-1]
        found = dict(zip(keys, _split(scores.logps, order, ends), strict=True))
        if scores.tail is not None:
            found |= zip(map(_tail_key, keys), _split(scores.tail, order, ends), strict=True)
        return found


def item_trees(item: Item, first_slot: int) -> list[Tree]:
    """Trees of an item, its sequences in slots from ``first_slot`` on."""
    trees: list[Tree] = []
    for slot, (prompt, completion, *scored) in enumerate(item, first_slot):
        branch = Branch(completion, slot, *scored)
        if trees and len(prompt) and np.array_equal(trees[-1].prefix, prompt):
            trees[-1] = Tree(prompt, (*trees[-1].branches, branch))
        else:
            trees.append(Tree(prompt, (branch,)))
    return trees


def _num_tokens(item: Item) -> int:
    """Tokens that an item takes in a row."""
    return sum(tree.num_tokens for tree in item_trees(item, 0))


def item_keys(items: Sequence[Item]) -> list[_Keys]:
    """Content keys of the sequences of every item."""
    pairs = [pair for item in items for pair in item]
    if not pairs:
        return []
    sequences = [np.concatenate(pair[:2]) for pair in pairs]
    masks = [np.arange(len(ids)) >= max(len(pair[0]), 1) for ids, pair in zip(sequences, pairs, strict=True)]
    for mask, (prompt, _, *scored) in zip(masks, pairs, strict=True):
        if scored and scored[0] is not None:
            mask[len(prompt) :] &= scored[0]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in sequences])])
    keys = iter(sequence_keys(np.concatenate(sequences), np.concatenate(masks), offsets))
    return [tuple(next(keys) for _ in item) for item in items]


def _plan(packing: Packing, items: Sequence[Item], max_tokens: int) -> Iterable[list[int]]:
    if packing.packed or packing.alone:
        return packing.rows_of([_num_tokens(item) for item in items], max_tokens)
    # Padded rows hold items of like length, or most of them would be padding.
    rows: list[list[int]] = [[]]
    longest = [max(len(pair[0]) + len(pair[1]) for pair in item) for item in items]
    for number in sorted(range(len(items)), key=lambda n: longest[n]):
        count = sum(len(items[n]) for n in rows[-1]) + len(items[number])
        if rows[-1] and longest[number] * count > max_tokens:
            rows.append([])
        rows[-1].append(number)
    return rows


def _split(values: Tensor, order: Any, ends: Any) -> list[Floats]:
    parts = np.split(values.detach().float().cpu().numpy()[order], ends)
    return [np.array(part, dtype=np.float32) for part in parts]


def _tail_key(key: bytes) -> bytes:
    """Key of a sequence's tail probabilities in the store, beside that of its log-probs."""
    return b"tail:" + key
