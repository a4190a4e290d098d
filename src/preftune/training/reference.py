"""Where a preference trainer's reference log-probs come from.

A reference that stays fixed is scored once, before training, over the pairs that training will see; the values go to
the content-addressed store, and a run finds there what any earlier run has computed. The initial policy *is* the usual
reference, so that no second model is loaded for it. Where values cannot be known beforehand (streamed data, a reference
that follows the policy, the store switched off) a shadow of the trainable parameters, or the model that was given, is
run along.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from preftune.errors import TrainingError
from preftune.kernels.device import put
from preftune.kernels.head import TokenScores
from preftune.models.forward import RowForward
from preftune.objectives import ld_weights
from preftune.packing import PackedRow, share_out
from preftune.references.fingerprint import model_weights_key, trained_adapter
from preftune.references.live import (
    Shadow,
    Value,
    like,
    parameters_of,
    reshard,
    shard_of,
    state_of,
    trained_parameters,
    using_adapter,
)
from preftune.references.scoring import ITEMS_PER_CHUNK, Floats, Item, SequenceScorer
from preftune.references.store import ReferenceStore
from preftune.terminal.progress import Progress
from preftune.training.batch import Example, Examples, as_arrays
from preftune.training.sequences import sequence_sums

if TYPE_CHECKING:
    from datasets import Dataset

#: Columns that hold the reference's sums.
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")

Sums = npt.NDArray[np.float64]


class Reference:
    """Reference of one trainer.

    Args:
        forward: The policy's forward, in its initial state; the reference too unless ``model`` is given.
        autocast: Makes the autocast region that the policy trains in.
        store: Store for fixed references; ``None`` computes them along with the training.
        model: Separate reference model, or ``None``.
        adapter: Adapter of the policy's model that is the reference, or ``None``.
        ld_alpha: Weight of tokens beyond the shorter completion.
        compute: What beside the weights decides the numbers.
        rounding: Tells how a sharded policy rounds otherwise than a whole one, for the store's key.
        reload: Loads the reference again where the policy has moved on and nothing of it was kept.
        spread: Shards a model where the policy is sharded.
        show_progress: Draw a progress bar over the reference pass.
        follows: Whether it follows the policy, so that it is part of a checkpoint.
        tolerance: Nats per token by which stored values may differ from what the reference says of one pair.
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
        rounding: Callable[[], str] = str,
        reload: Callable[[], RowForward | None] = lambda: None,
        spread: Callable[[Any], None] = lambda model: None,
        show_progress: bool = True,
        follows: bool = False,
        tolerance: float | None = None,
    ) -> None:
        self.policy = forward
        self.separate = model
        self.adapter = adapter
        self.store = store
        self.ld_alpha = ld_alpha
        self.follows = follows
        self.policy_moved = False
        self.shadow: Shadow | None = None
        self._autocast = autocast
        self._compute = compute or {}
        self._rounding = rounding
        self._reload = reload
        self._spread = spread
        self._show_progress = show_progress
        self._key: str | None = None
        self._scorer = SequenceScorer(
            lambda row, tail: self.row_scores(row, with_tail=tail),
            self._ready,
            store=store,
            weights_key=lambda: self._store_key,
            name="the reference pass",
            tolerance=lambda: None if self.policy_moved else tolerance,
        )
        self._live: dict[int, tuple[Tensor, Tensor]] = {}

    # ---- fixed references -----------------------------------------------------------------------------------------

    @property
    def weights_key(self) -> str:
        """Content key of the reference's weights; taken while the policy still is in its initial state."""
        if self._key is None:
            model = (self.separate or self.policy).model
            self._key = model_weights_key(model, self._compute, adapter=self.adapter or trained_adapter(model))
        return self._key

    @property
    def _store_key(self) -> str:
        """Key in the store, where log-probs that are rounded otherwise have another one."""
        key, rounding = self.weights_key, self._rounding()
        return hashlib.sha256(f"{key}|{rounding}".encode()).hexdigest()[: len(key)] if rounding else key

    def sums(
        self,
        dataset: Dataset,
        indices: Sequence[int],
        *,
        max_tokens: int,
        costs: npt.NDArray[np.int64] | None = None,
        share: tuple[int, int] = (0, 1),
        joined: Callable[[Sums], Sums] = lambda sums: sums,
        in_step: Callable[[int], int] | None = None,
        description: str = "Reference",
    ) -> Sums:
        """Reference sums of the pairs ``indices``, from the store where known, computed and stored where not.

        Args:
            dataset: Tokenised pairs.
            indices: Rows that are needed.
            max_tokens: Token budget of a row of the reference pass.
            costs: What each pair costs, by its row, where processes divide them.
            share: This process's number and the number of processes.
            joined: Adds up what all processes have.
            in_step: Gives the largest of a number in all processes, where these have to run equally many rows.
            description: Title of the progress bar.

        Returns:
            ``(len(dataset), 2)``: chosen and rejected; NaN in rows that were not asked for.
        """
        out = np.full((len(dataset), 2), np.nan)
        with Progress(len(indices), description, self._show_progress and share[0] == 0, unit="pair") as progress:
            size = ITEMS_PER_CHUNK * share[1]
            for start in range(0, len(indices), size):
                chunk = indices[start : start + size]
                # Each process reads, looks up and scores its own alone, and all get two numbers per pair.
                mine: Sequence[int] = range(len(chunk))
                if costs is not None:
                    mine = share_out(costs[chunk].tolist(), share[1])[share[0]]
                rows = _rows(dataset, [chunk[place] for place in mine or [0]])
                items = [_sequences(as_arrays(example)) for example in rows]
                values = self._scorer.values(
                    items[: len(mine)],
                    max_tokens,
                    in_step=in_step,
                    stand_in=items[0],
                    # What this process has done stands for the others.
                    progress=lambda number: progress.add(number * share[1]),
                )
                found = np.zeros((len(chunk), 2))
                for place, each in zip(mine, values, strict=True):
                    found[place] = self._weighted_sums(each[0], each[-1])
                out[chunk] = joined(found)
                progress.reach(start + len(chunk))
        return out

    @property
    def num_scored(self) -> int:
        """Pairs computed so far."""
        return self._scorer.num_scored

    @property
    def num_found(self) -> int:
        """Pairs found in the store so far."""
        return self._scorer.num_found

    def _ready(self) -> RowForward:
        """The model that computes the reference, loaded again where nothing of it is left."""
        if self.policy_moved and not self._lasts and self.shadow is None:
            self.separate = self._reloaded()
        return self.separate or self.policy

    def _reloaded(self) -> RowForward:
        """The reference, loaded from where the policy came from and proved to be the same by its content."""
        forward = self._reload()
        if forward is not None:
            key = model_weights_key(forward.model, self._compute, adapter=trained_adapter(forward.model))
            if key == self.weights_key:
                self._spread(forward.model)
                return forward
        raise TrainingError(
            "reference log-probs of new pairs are asked for, but the policy has moved on and the model it started from "
            "cannot be loaded again",
            remedy="pass these pairs as eval_dataset from the start, give a ref_model, or set reference_store: false",
        )

    def _weighted_sums(self, chosen: Floats, rejected: Floats) -> tuple[float, float]:
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

    def spread(self) -> None:
        """Shard a model of its own where the policy is sharded; the weights' key has to be known before."""
        if self.separate is not None:
            self._spread(self.separate.model)

    def keep_shadow(self) -> None:
        """Remember the policy's present state as the reference, for use while the policy moves on."""
        if self.shadow is None and not self._lasts:
            self.shadow = Shadow(self.policy.model)

    def follow(self, share: float) -> None:
        """Move towards the policy: ``reference <- share * policy + (1 - share) * reference`` (TR-DPO, 2404.09656)."""
        with torch.no_grad():
            for mine, policys in zip(self.following(), self._followed(), strict=True):
                shard = shard_of(mine)
                shard.lerp_(shard_of(like(policys, mine)).to(shard.dtype), share)

    def following(self) -> list[Value]:
        """The tensors of a reference that follows the policy."""
        if self.separate is not None:
            return [state_of(p) for p in parameters_of(self.separate.model)]
        assert self.shadow is not None
        return self.shadow.state()

    def _followed(self) -> list[Value]:
        return [state_of(p) for p in trained_parameters(self.policy.model)]

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

    # ---- what a row's loss asks for ---------------------------------------------------------------------------------

    def run_along(self, rows: Sequence[PackedRow], examples: Examples) -> None:
        """Score the rows of a step, where the values are not in the data."""
        if not (examples and COLUMNS[0] in examples[0]):
            self._live = {id(row): sequence_sums(row, self.row_logps(row), self.ld_alpha) for row in rows}
            if self.separate is not None:
                reshard(self.separate.model)

    def row_sums(self, row: PackedRow, examples: Examples, like: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of a row's chosen and rejected completions, from the data or from :meth:`run_along`.

        Raises:
            TrainingError: A value in the data is missing.
        """
        if COLUMNS[0] not in examples[0]:
            return self._live[id(row)]
        known = np.array([[e[column] for column in COLUMNS] for e in examples])
        if np.isnan(known).any():
            raise TrainingError(
                "a pair's reference log-probs were not computed before training",
                remedy="set reference_store: false; where no loader or sampler of your own draws the rows, report this:"
                " the data order was foreseen wrongly",
            )
        values = put(known, like.device, like.dtype)
        return values[:, 0], values[:, 1]


def _sequences(example: Example) -> Item:
    """The two sequences of a pair; a single answer that stands as both is one."""
    prompt, other = example["prompt_ids"], example.get("rejected_prompt_ids")
    other = prompt if other is None else other
    chosen = (prompt, example["chosen_ids"], example.get("chosen_mask"))
    rejected = (other, example["rejected_ids"], example.get("rejected_mask"))
    same = all(map(np.array_equal, chosen, rejected))
    return [chosen] if same else [chosen, rejected]


def _rows(dataset: Dataset, indices: Sequence[int]) -> Iterable[Example]:
    columns = dataset[list(indices)]
    names = list(columns)
    for values in zip(*(columns[name] for name in names), strict=True):
        yield dict(zip(names, values, strict=True))
