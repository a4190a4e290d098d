"""A model of its own, made ready to score completions; see :mod:`preftune.references.scoring`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from preftune.errors import ModelError
from preftune.models.forward import RowForward
from preftune.models.gate import Verdict
from preftune.models.head import base_model
from preftune.models.path import PathChoice
from preftune.references.fingerprint import model_weights_key, trained_adapter
from preftune.references.scoring import ITEMS_PER_CHUNK, STORED_AGREEMENT, Floats, Item, SequenceScorer
from preftune.references.store import ReferenceStore
from preftune.terminal.progress import Progress

#: Longer rows do not run faster.
_MOST_TOKENS = {"cpu": 4096, "cuda": 16384}


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
        self.adapter_off = adapter_off
        self._bf16 = bf16
        self._show = show_progress
        self._key: str | None = None
        self.device = next(model.parameters()).device
        self._max_tokens = max_tokens or _MOST_TOKENS.get(self.device.type, 8192)
        choice = PathChoice(packing_mode, backend, pad_token_id, max_length)
        if like is not None and _same_kind(like.model, self.model):
            self.verdict: Verdict = like.verdict
            self.forward: RowForward = choice.forward_of(model, self.verdict)
        else:
            self.forward, self.verdict = choice.of(model, self.autocast)
        self._scorer = SequenceScorer(
            lambda row, tail: self.forward(row, with_tail=tail)[0],
            lambda: self.forward,
            store=store,
            weights_key=lambda: self.weights_key,
            around=self._rows,
            tolerance=lambda: STORED_AGREEMENT[bf16 or next(model.parameters()).dtype != torch.float32],
        )

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

    @contextmanager
    def _rows(self) -> Iterator[None]:
        with self.running(), self.forward.active():
            yield

    @property
    def num_scored(self) -> int:
        """Items computed so far."""
        return self._scorer.num_scored

    @property
    def num_found(self) -> int:
        """Items found in the store so far."""
        return self._scorer.num_found

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
        with Progress(len(items), description, self._show, unit="pair") as progress:
            for start in range(0, len(items), ITEMS_PER_CHUNK):
                chunk = items[start : start + ITEMS_PER_CHUNK]
                out += self._scorer.values(chunk, self._max_tokens, tail=tail, progress=progress.add)
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


def _same_kind(one: Any, other: Any) -> bool:
    """Whether two models compute alike but for their weights, so that one start-up probe speaks for both."""
    if one is other:
        return True
    first, second = base_model(one), base_model(other)
    drop = ("_name_or_path", "transformers_version")
    configs = [{k: v for k, v in each.config.to_dict().items() if k not in drop} for each in (first, second)]
    return type(first) is type(second) and configs[0] == configs[1] and type(one) is type(other)
