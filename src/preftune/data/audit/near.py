"""Near duplicates: MinHash finds candidates, and the exact Jaccard similarity of their shingles decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from preftune.data.audit.optional_libraries import optional
from preftune.data.audit.text import shingles

Numbers = np.ndarray[Any, np.dtype[np.uint64]]

#: Similarity from which on two texts count as nearly the same.
THRESHOLD = 0.8
_NUM_HASHES = 128
# Candidates looked at for one text; among hundreds that are alike, one of the first is as good as any.
_MAX_CANDIDATES = 50


@dataclass(frozen=True, eq=False)
class Shingled:
    """Shingles of one or more texts that are compared part by part.

    Attributes:
        parts: Sorted distinct 64-bit numbers, one array per text; arrays take a tenth of the memory of sets.
    """

    parts: tuple[Numbers, ...]

    @classmethod
    def of(cls, *texts: str) -> Shingled:
        """Shingles of texts, for example prompt, chosen and rejected."""
        # The mark keeps parts apart in the joint sketch: what one answer says must not match the other answer.
        found = (shingles(text, f"{number}:") for number, text in enumerate(texts))
        return cls(tuple(np.array(sorted(part), dtype=np.uint64) for part in found))

    @property
    def union(self) -> Numbers:
        """Shingles of all parts. Where every part is similar to a degree, their union is at least as similar."""
        return np.concatenate(self.parts)

    def is_near(self, other: Shingled) -> bool:
        """Whether every part is nearly the same."""
        return all(jaccard(a, b) >= THRESHOLD for a, b in zip(self.parts, other.parts, strict=True))


def jaccard(first: Numbers, second: Numbers) -> float:
    """Size of the intersection over that of the union of two sets; 1 for two empty ones."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    union = len(first) + len(second) - shared
    return shared / union if union else 1.0


def _low_bits(number: int) -> int:
    """Shingles are hashes already."""
    return number & 0xFFFFFFFF


class NearIndex:
    """Texts that later ones are compared with."""

    def __init__(self) -> None:
        sketch = optional("datasketch", "datasketch")
        self._minhash = sketch.MinHash(num_perm=_NUM_HASHES, seed=1, hashfunc=_low_bits)
        # Candidates are verified, so that missing one weighs more than one too many.
        self._lsh = sketch.MinHashLSH(threshold=THRESHOLD, num_perm=_NUM_HASHES, weights=(0.2, 0.8))
        self._items: dict[int, Shingled] = {}

    def __len__(self) -> int:
        return len(self._items)

    def find(self, item: Shingled) -> int | None:
        """Key of a text that is nearly the same; the smallest, where there are several."""
        union = item.union
        if not len(union) or not self._items:
            return None
        candidates = sorted(self._lsh.query(self._sketch(union)))[:_MAX_CANDIDATES]
        return next((int(key) for key in candidates if item.is_near(self._items[key])), None)

    def add(self, key: int, item: Shingled) -> None:
        """Remember a text."""
        union = item.union
        if len(union):
            self._lsh.insert(key, self._sketch(union), check_duplication=False)
            self._items[key] = item

    def _sketch(self, union: Numbers) -> Any:
        minhash = self._minhash.copy()
        minhash.clear()
        minhash.update_batch(union.tolist())
        return minhash
