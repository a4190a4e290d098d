"""Token counts of prepared data, read from the columns' offsets without touching the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ExampleLengths:
    """Token counts per example, each ``(examples,)``.

    Attributes:
        prompt: Prompt tokens, counted once.
        completion: Tokens of all completions.
        row: Tokens that the example takes in a packed row.
        sequences: Lengths of the separate sequences, ``(examples, sequences)``.
    """

    prompt: Counts
    completion: Counts
    row: Counts
    sequences: Counts

    @property
    def longest_sequence(self) -> int:
        """Longest sequence, or 0 without examples."""
        return int(self.sequences.max(initial=0))

    @property
    def longest_row(self) -> int:
        """Most row tokens of an example, or 0 without examples."""
        return int(self.row.max(initial=0))

    def padded_tokens(self, batch_size: int) -> int:
        """Tokens that batches of ``batch_size`` examples, padded to their longest sequence, would compute."""
        longest = self.sequences.max(1, initial=0)
        count = self.sequences.shape[1]
        starts = np.arange(0, len(longest), batch_size)
        sizes = np.minimum(batch_size, len(longest) - starts)
        return int((np.maximum.reduceat(longest, starts) * sizes * count).sum()) if len(longest) else 0


def pair_lengths(dataset: Any) -> ExampleLengths | None:
    """Lengths of tokenised pairs; ``None`` for streamed data."""
    if not isinstance(dataset, datasets.Dataset):
        return None
    prompt, chosen, rejected = (_lengths(dataset, f"{name}_ids") for name in ("prompt", "chosen", "rejected"))
    other, own = prompt, np.zeros(len(prompt), dtype=bool)
    if "rejected_prompt_ids" in dataset.column_names:
        given = _lengths(dataset, "rejected_prompt_ids", missing=-1)
        own = given >= 0
        other = np.where(own, given, prompt)
    return ExampleLengths(
        prompt=prompt + np.where(own, other, 0),
        completion=chosen + rejected,
        row=prompt + np.where(own, other, 0) + chosen + rejected,
        sequences=np.stack([prompt + chosen, other + rejected], 1),
    )


def sequence_lengths(dataset: Any) -> ExampleLengths | None:
    """Lengths of tokenised SFT examples; ``None`` for streamed data."""
    if not isinstance(dataset, datasets.Dataset):
        return None
    total = _lengths(dataset, "input_ids")
    trained = np.array([int(np.sum(mask)) for mask in dataset["loss_mask"]], dtype=np.int64)
    return ExampleLengths(total - trained, trained, total, total[:, None])


def _lengths(dataset: datasets.Dataset, column: str, missing: int = 0) -> Counts:
    table = dataset.with_format("arrow")[column]
    values = pc.fill_null(pc.list_value_length(table), missing)
    lengths: Counts = values.to_numpy(zero_copy_only=False) if hasattr(values, "to_numpy") else np.asarray(values)
    return lengths.astype(np.int64)
