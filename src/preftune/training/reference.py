"""Where a preference trainer's reference log-probs come from.

A reference that stays fixed is scored once, before training, over the pairs that training will see; the values go to
the content-addressed store, and a run finds there what any earlier run has computed. The initial policy *is* the usual
reference, so that no second model is loaded for it. Where values cannot be known beforehand (streamed data, a reference
that follows the policy, the store switched off) a shadow of the trainable parameters, or the model that was given, is
run along.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from tqdm.auto import tqdm

from preftune.errors import SetupError, TrainingError
from preftune.kernels.head import TokenScores
from preftune.models.forward import RowForward
from preftune.objectives import ld_weights
from preftune.packing import Branch, PackedRow, Tree, build_row, pair_trees
from preftune.references.fingerprint import model_weights_key, sequence_keys, trained_adapter
from preftune.references.live import Shadow, using_adapter
from preftune.references.store import ReferenceStore
from preftune.training.batch import Example, as_arrays
from preftune.training.recovery import ran_out_of_memory

if TYPE_CHECKING:
    from datasets import Dataset

#: Columns that hold the reference's sums.
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_PAIRS_PER_CHUNK = 512

Floats = npt.NDArray[np.float32]
Sums = npt.NDArray[np.float64]


@dataclass
class PairSequences:
    """The two sequences of a pair, as the store and the packed row need them.

    Attributes:
        chosen: Prompt and chosen completion, token ids.
        rejected: Prompt and rejected completion, token ids.
        chosen_prompt: Prompt tokens in ``chosen``.
        rejected_prompt: Prompt tokens in ``rejected``.
    """

    chosen: Any
    rejected: Any
    chosen_prompt: int
    rejected_prompt: int

    @classmethod
    def of(cls, example: Example) -> PairSequences:
        """Join prompt and completions of a tokenised pair."""
        prompt = example["prompt_ids"]
        other = example.get("rejected_prompt_ids")
        other = prompt if other is None else other
        return cls(
            np.concatenate([prompt, example["chosen_ids"]]),
            np.concatenate([other, example["rejected_ids"]]),
            len(prompt),
            len(other),
        )


class Reference:
    """Reference of one trainer.

    Args:
        forward: The policy's forward, in its initial state; the reference too unless ``model`` is given.
        autocast: Makes the autocast region that the policy trains in.
        store: Store for fixed references; ``None`` computes them along with the training.
        model: Separate reference model, or ``None``.
        adapter: Adapter of the policy's model that is the reference, or ``None``.
        ld_alpha: Weight of tokens beyond the shorter completion.
        compute: What beside the weights decides the numbers, for the store's key.
        reload: Loads the reference again where the policy has moved on and nothing of it was kept.
        show_progress: Draw a progress bar over the reference pass.
    """

    def __init__(
        self,
        forward: RowForward,
        autocast: Callable[[], AbstractContextManager[Any]],
        *,
        store: ReferenceStore | None,
        model: RowForward | None = None,
        adapter: str | None = None,
        ld_alpha: float | None = None,
        compute: dict[str, Any] | None = None,
        reload: Callable[[], RowForward | None] = lambda: None,
        show_progress: bool = True,
    ) -> None:
        self.policy = forward
        self.separate = model
        self.adapter = adapter
        self.store = store
        self.ld_alpha = ld_alpha
        self.num_scored = 0
        self.num_found = 0
        self.policy_moved = False
        self.shadow: Shadow | None = None
        self._autocast = autocast
        self._compute = compute or {}
        self._reload = reload
        self._show_progress = show_progress
        self._key: str | None = None
        self._budget: int | None = None

    # ---- fixed references -----------------------------------------------------------------------------------------

    @property
    def weights_key(self) -> str:
        """Content key of the reference's weights; taken while the policy still is in its initial state."""
        if self._key is None:
            model = (self.separate or self.policy).model
            self._key = model_weights_key(model, self._compute, adapter=self.adapter or trained_adapter(model))
        return self._key

    def sums(
        self,
        dataset: Dataset,
        indices: Sequence[int],
        *,
        max_tokens: int,
        share: tuple[int, int] = (0, 1),
        exchange: Callable[[dict[bytes, Any]], dict[bytes, Any]] = lambda values: values,
        description: str = "Reference",
    ) -> Sums:
        """Reference sums of the pairs ``indices``, from the store where known, computed and stored where not.

        Args:
            dataset: Tokenised pairs.
            indices: Rows that are needed.
            max_tokens: Token budget of a row of the reference pass.
            share: This process's number and the number of processes, which divide the missing pairs.
            exchange: Gathers ``{key: values}`` from all processes.
            description: Title of the progress bar.

        Returns:
            ``(len(dataset), 2)``: chosen and rejected; NaN in rows that were not asked for.
        """
        assert self.store is not None
        out = np.full((len(dataset), 2), np.nan)
        chunks = [indices[i : i + _PAIRS_PER_CHUNK] for i in range(0, len(indices), _PAIRS_PER_CHUNK)]
        # Unset, a bar is drawn where there is a terminal: in a file it would be one long line.
        hidden = True if share[0] != 0 or not self._show_progress else None
        with tqdm(total=len(indices), desc=description, unit="pair", disable=hidden) as bar:
            for chunk in chunks:
                pairs = [PairSequences.of(as_arrays(example)) for example in _rows(dataset, chunk)]
                values = self._values(pairs, max_tokens, share, exchange)
                for index, pair, keys in zip(chunk, pairs, _pair_keys(pairs), strict=True):
                    out[index] = self._weighted_sums(values[keys[0]], values[keys[1]], pair)
                bar.update(len(chunk))
        return out

    def _values(
        self,
        pairs: list[PairSequences],
        max_tokens: int,
        share: tuple[int, int],
        exchange: Callable[[dict[bytes, Any]], dict[bytes, Any]],
    ) -> dict[bytes, Floats]:
        assert self.store is not None
        keys = _pair_keys(pairs)
        known: dict[bytes, Floats] = dict(self.store.get_many(self.weights_key, [key for both in keys for key in both]))
        missing = {both: n for n, both in enumerate(keys) if not (both[0] in known and both[1] in known)}
        self.num_found += len(pairs) - len(missing)
        if share[1] > 1:
            # Another process may have stored a value between two look-ups: what one misses, all count as missing.
            union = exchange(dict(missing.keys()))
            missing = {both: n for n, both in enumerate(keys) if both[0] in union and union[both[0]] == both[1]}
        numbers = sorted(missing.values())[share[0] :: share[1]]
        computed = self._score_pairs([pairs[n] for n in numbers], [keys[n] for n in numbers], max_tokens)
        if computed:
            self.store.put_many(self.weights_key, computed)
        known.update(exchange(computed))
        return known

    def _score_pairs(
        self, pairs: list[PairSequences], keys: list[tuple[bytes, bytes]], max_tokens: int
    ) -> dict[bytes, Floats]:
        if not pairs:
            return {}
        if self.policy_moved and not self._lasts and self.shadow is None:
            self.separate = self._reloaded()
        # A single answer stands as both of its pair's sequences, and is scored once.
        single = [one == other for one, other in keys]
        trees = [_trees(pair, 0, alone) for pair, alone in zip(pairs, single, strict=True)]
        lengths = [sum(tree.num_tokens for tree in each) for each in trees]
        found: dict[bytes, Floats] = {}

        def score(numbers: list[int]) -> None:
            in_row = [tree for k, n in enumerate(numbers) for tree in _trees(pairs[n], 2 * k, single[n])]
            row = build_row(in_row, numbers)
            logps = self.row_logps(row).float().cpu().numpy()
            slots = row.target_slot
            for k, n in enumerate(numbers):
                found[keys[n][0]] = logps[slots == 2 * k]
                if not single[n]:
                    found[keys[n][1]] = logps[slots == 2 * k + 1]

        left = list(range(len(pairs)))
        while left:
            for numbers in self._plan([lengths[n] for n in left], self._most_tokens(max_tokens)):
                row_numbers = [left[n] for n in numbers]
                if not self._fits(score, row_numbers, sum(lengths[n] for n in row_numbers)):
                    break
            left = [n for n in left if keys[n][0] not in found]
        self.num_scored += len(pairs)
        return found

    def _most_tokens(self, asked: int) -> int:
        """Token budget of a row: what is asked for, unless memory has run out with less."""
        return asked if self._budget is None else min(asked, self._budget)

    def _fits(self, score: Callable[[list[int]], None], numbers: list[int], num_tokens: int) -> bool:
        """Score a row; where memory runs out, halve the rows that are still to come and return ``False``.

        Raises:
            SetupError: If the row holds one pair alone.
        """
        try:
            score(numbers)
            return True
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            if len(numbers) == 1:
                raise SetupError(
                    f"memory ran out in a row of {num_tokens} tokens of the reference pass, which holds one pair",
                    remedy="lower max_length",
                ) from error
        # Out of the handler, whose traceback holds the activations.
        clear_device_cache(garbage_collection=True)
        self._budget = max(1, num_tokens // 2)
        warnings.warn(
            f"memory ran out in the reference pass; its rows from now on hold up to {self._budget} tokens, and results "
            "stay the same",
            UserWarning,
            stacklevel=2,
        )
        return False

    def _plan(self, lengths: list[int], max_tokens: int) -> list[list[int]]:
        """Rows of the reference pass. Padded rows hold pairs of like length, or most of them would be padding."""
        forward = self.separate or self.policy
        if forward.packed or forward.alone:
            return forward.rows_of(lengths, max_tokens)
        rows: list[list[int]] = [[]]
        for number in sorted(range(len(lengths)), key=lambda n: lengths[n]):
            if rows[-1] and 2 * lengths[number] * (len(rows[-1]) + 1) > max_tokens:
                rows.append([])
            rows[-1].append(number)
        return rows

    def _reloaded(self) -> RowForward:
        """The reference, loaded from where the policy came from and proved to be the same by its content."""
        forward = self._reload()
        if forward is not None:
            key = model_weights_key(forward.model, self._compute, adapter=trained_adapter(forward.model))
            if key == self.weights_key:
                return forward
        raise TrainingError(
            "reference log-probs of new pairs are asked for, but the policy has moved on and the model it started from "
            "cannot be loaded again",
            remedy="pass these pairs as eval_dataset from the start, give a ref_model, or set reference_store: false",
        )

    def _weighted_sums(self, chosen: Floats, rejected: Floats, pair: PairSequences) -> tuple[float, float]:
        if self.ld_alpha is None:
            return float(chosen.sum(dtype=np.float64)), float(rejected.sum(dtype=np.float64))
        lengths = torch.tensor([len(chosen), len(rejected)])
        weights = ld_weights(lengths, lengths.flip(0), self.ld_alpha).numpy().astype(np.float64)
        return float(chosen @ weights[: len(chosen)]), float(rejected @ weights[len(chosen) :])

    # ---- running the reference --------------------------------------------------------------------------------------

    @property
    def _lasts(self) -> bool:
        """Whether the reference is there for itself, however far the policy moves."""
        return self.separate is not None or self.adapter is not None

    @property
    def description(self) -> str:
        """Which model it is, in words."""
        if self.adapter is not None:
            return f"the adapter {self.adapter}"
        return "the given ref_model" if self.separate is not None else "the policy before training"

    def keep_shadow(self) -> None:
        """Remember the policy's present state as the reference, for use while the policy moves on."""
        if self.shadow is None and not self._lasts:
            self.shadow = Shadow(self.policy.model)

    def follow(self, share: float) -> None:
        """Move towards the policy: ``reference <- share * policy + (1 - share) * reference`` (TR-DPO, 2404.09656)."""
        with torch.no_grad():
            for mine, policys in zip(self.following(), self._followed(), strict=True):
                mine.lerp_(policys, share)

    def following(self) -> list[Tensor]:
        """The tensors of a reference that follows the policy."""
        if self.separate is not None:
            return [p.detach() for p in self.separate.model.parameters()]
        assert self.shadow is not None
        return self.shadow.state()

    def _followed(self) -> list[Tensor]:
        if self.separate is not None:
            return [p.detach() for p in self.policy.model.parameters()]
        return [p.detach() for p in self.policy.model.parameters() if p.requires_grad]

    @contextmanager
    def _as_reference(self) -> Iterator[RowForward]:
        if self.separate is not None:
            yield self.separate
            return
        if self.adapter is not None:
            with using_adapter(self.policy.model, self.adapter):
                yield self.policy
            return
        with self.shadow.active() if self.shadow is not None else nullcontext():
            yield self.policy

    def row_logps(self, row: PackedRow) -> Tensor:
        """Per-token log-probs of a row's targets under the reference, ``(N,)``, without graph."""
        return self.row_scores(row).logps

    def row_scores(self, row: PackedRow, *, with_tail: bool = False) -> TokenScores:
        """Scores of a row's targets under the reference, without graph; see :class:`RowForward`."""
        with torch.no_grad(), self._as_reference() as forward:
            training = forward.model.training
            forward.model.eval()
            try:
                with self._autocast(), forward.active():
                    return forward(row, with_tail=with_tail)[0]
            finally:
                forward.model.train(training)


def _trees(pair: PairSequences, first_slot: int, alone: bool) -> tuple[Tree, ...]:
    prompt, chosen = pair.chosen[: pair.chosen_prompt], pair.chosen[pair.chosen_prompt :]
    if alone:
        return (Tree(prompt, (Branch(chosen, first_slot),)),)
    other, rejected = pair.rejected[: pair.rejected_prompt], pair.rejected[pair.rejected_prompt :]
    same = len(prompt) == len(other) and np.array_equal(prompt, other)
    return pair_trees(prompt, chosen, rejected, None if same else other, (first_slot, first_slot + 1))


def _pair_keys(pairs: list[PairSequences]) -> list[tuple[bytes, bytes]]:
    sequences = [ids for pair in pairs for ids in (pair.chosen, pair.rejected)]
    prompts = [length for pair in pairs for length in (pair.chosen_prompt, pair.rejected_prompt)]
    if not sequences:
        return []
    masks = [np.arange(len(ids)) >= max(length, 1) for ids, length in zip(sequences, prompts, strict=True)]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in sequences])])
    keys = sequence_keys(np.concatenate(sequences), np.concatenate(masks), offsets)
    return list(zip(keys[0::2], keys[1::2], strict=True))


def _rows(dataset: Dataset, indices: Sequence[int]) -> Iterable[Example]:
    columns = dataset[list(indices)]
    names = list(columns)
    for values in zip(*(columns[name] for name in names), strict=True):
        yield dict(zip(names, values, strict=True))
