"""Examples on their way from the data loader to the packed rows of one optimizer step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Example = dict[str, Any]
Examples = Sequence[Example]
#: Sums over all examples of a step, see ``Task.totals``.
Totals = Sequence[float]


@dataclass
class Batch:
    """Examples as the data loader yields them.

    No mapping on purpose: data-loader wrappers walk mappings and lists element by element, which costs more than the
    tokens are worth.

    Attributes:
        examples: One mapping per example.
        sizes: How many of them the data loader grouped together each time.
        weightless: Whether they are another process's, and only take the place of missing ones: they keep it in step
            and count for nothing.
    """

    examples: list[Example] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    weightless: bool = False

    def __len__(self) -> int:
        return len(self.examples)

    def __getattr__(self, name: str) -> Any:
        what = f"a batch has no {name!r}: it holds examples, which are packed into rows, and no tensors"
        raise AttributeError(f"{what}; see Batch.examples")

    @classmethod
    def merged(cls, batches: Iterable[Batch]) -> Batch:
        """All examples of several batches, in order."""
        parts = list(batches)
        examples = [example for batch in parts for example in batch.examples]
        return cls(examples, [size for batch in parts for size in batch.sizes])

    def groups(self) -> list[list[int]]:
        """Numbers of the examples in every group of the data loader."""
        starts = itertools.accumulate(self.sizes, initial=0)
        groups = [list(range(start, start + size)) for start, size in zip(starts, self.sizes, strict=False)]
        return [group for group in groups if group]


def as_arrays(example: Example) -> Example:
    """The example with its token columns as int64 arrays, and masks as booleans."""
    out = dict(example)
    for name, value in example.items():
        if value is not None and name.endswith("_ids"):
            out[name] = np.asarray(value, dtype=np.int64)
        elif value is not None and name.endswith("_mask"):
            out[name] = np.asarray(value, dtype=bool)
    return out


def collate(examples: Examples) -> Batch:
    """Collate function of every preftune trainer: nothing is padded, nothing becomes a tensor yet."""
    return Batch([as_arrays(example) for example in examples], [len(examples)])
