"""NEFTune: uniform noise on the embeddings of training sequences (Jain et al. 2023, arXiv 2310.05914, algorithm 1).

A token's noise is at most ``alpha / sqrt(L d)``, with ``L`` the length of its sequence and ``d`` the size of an
embedding. In a packed row ``L`` is that of the sequence, not of the row; a shared prompt carries one noise for all its
answers, with the ``L`` of the longest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from preftune.kernels.device import put
from preftune.models.head import base_model
from preftune.packing import PackedRow, RowLayout


class EmbeddingNoise:
    """Noise on a model's embeddings, row by row.

    Args:
        model: The policy, under PEFT or not.
        alpha: Strength, as in the paper (5 to 15 there).
    """

    def __init__(self, model: nn.Module, alpha: float) -> None:
        self._embeddings: nn.Module = base_model(model).get_input_embeddings()
        self.alpha = alpha

    @contextmanager
    def on(self, row: PackedRow, *, packed: bool) -> Iterator[None]:
        """Add noise in the forwards of ``row`` while active, whichever path computes it."""
        lengths = _packed_lengths(row.layout)[None] if packed else _sequence_lengths(row.layout)[:, None]

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            length = put(lengths, output.device)
            if packed:  # Rows may be filled up behind their last token.
                length = nn.functional.pad(length, (0, output.shape[1] - length.shape[1]), value=1.0)
            bound = self.alpha / (length * output.shape[-1]).sqrt()
            return output + torch.empty_like(output).uniform_(-1, 1) * bound.unsqueeze(-1).to(output.dtype)

        handle = self._embeddings.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def _packed_lengths(layout: RowLayout) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Length of the sequence that each token of a row belongs to, shape ``(T,)``."""
    parts = []
    for span in layout.spans:
        parts.append(np.full(span.prefix, span.longest))
        parts += [np.full(length, span.prefix + length) for length in span.branches]
    return np.concatenate(parts).astype(np.float32)


def _sequence_lengths(layout: RowLayout) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Lengths of a row's sequences, branch by branch."""
    return np.array([span.prefix + length for span in layout.spans for length in span.branches], dtype=np.float32)
