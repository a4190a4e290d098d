"""Packed or padded: what was asked for, what a model declares, what the probe shows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from torch import nn

from preftune.errors import ModelError
from preftune.models.forward import RowForward
from preftune.models.gate import Verdict, check_declared
from preftune.models.head import probe_head
from preftune.models.packing_probe import Context, probe

_TRIES: ContextVar[bool] = ContextVar("preftune_tries_models", default=True)


@contextmanager
def without_trial() -> Iterator[None]:
    """Go by what a model declares, without running it, as long as the block runs: for plans that train nothing."""
    token = _TRIES.set(False)
    try:
        yield
    finally:
        _TRIES.reset(token)


@dataclass(frozen=True)
class PathChoice:
    """How rows are to be computed.

    Attributes:
        mode: ``auto``, ``packed`` or ``padded``.
        backend: Attention backend of packed rows.
        pad_token_id: Fills padded batches.
        max_length: Tokens of the longest sequence, where they are known.
        padded_because: Why ``auto`` means padded rows here, whatever the model; ``None`` for no reason.
    """

    mode: str = "auto"
    backend: str = "auto"
    pad_token_id: int = 0
    max_length: int | None = None
    padded_because: str | None = None

    def of(self, model: nn.Module, autocast: Context) -> tuple[RowForward, Verdict]:
        """Decide for a model that runs within ``autocast()``.

        Raises:
            ModelError: Packed rows are insisted on and cannot be had.
        """
        verdict = self._verdict(model, autocast)
        if not verdict.ok and self.mode == "packed":
            raise ModelError(verdict.reason, where="packing_mode", value="packed", remedy="use packing_mode: auto")
        if not verdict.ok and self.mode == "auto":
            warnings.warn(f"sequences are padded, not packed: {verdict.reason}", UserWarning, stacklevel=5)
        return self.forward_of(model, verdict), verdict

    def forward_of(self, model: nn.Module, verdict: Verdict) -> RowForward:
        """The forward that a verdict calls for."""
        head = probe_head(model)
        return RowForward(model, verdict.ok, self.backend, head, self.pad_token_id, alone=verdict.alone)

    def _verdict(self, model: nn.Module, autocast: Context) -> Verdict:
        verdict = check_declared(model, max_length=self.max_length)
        if self.mode == "padded":
            return replace(verdict, ok=False, reason="asked for by packing_mode: padded")
        if self.padded_because and self.mode == "auto":
            return replace(verdict, ok=False, reason=self.padded_because)
        if not verdict.ok:
            return verdict
        if not _TRIES.get():
            return replace(verdict, reason="the model declares nothing against it; training begins with a trial")
        return probe(model, backend=self.backend, pad_token_id=self.pad_token_id, autocast=autocast)
